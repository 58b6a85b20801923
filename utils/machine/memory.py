"""Memory: the peak that was used, and errors that say what to do when memory is full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.errors import InputError

CONTINUE = "a run of train.py goes on with --resume_training logs/RUN"
IN_TRAINING = (
    "compute the batch in parts (--grad_cache 16), or add --use_amp or --grad_checkpointing, or "
)
# In the errors of the CPU; of GPUs; of cuBLAS and cuDNN.
FULL = "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"
SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share


@contextmanager
def explained(remedies: str = "") -> Iterator[None]:
    """Turn the errors of full memory, on the GPU or not, into an `InputError` that names what
    helps: `remedies`, such as `IN_TRAINING`, then arguments of all scripts. Also a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_memory or any(text in str(error) for text in FULL):
            raise InputError(
                f"memory is full: {remedies}lower --batch_size or --num_workers; {CONTINUE}"
            ) from error
        raise


def free_shared_memory() -> int | None:
    """The free bytes of the memory that processes share (in Docker 64 MB); None without a limit."""
    if not os.path.isdir(SHARED_MEMORY):  # noqa: PTH112 - a Path of Windows has no statvfs
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def peak_memory_mb(device: torch.device) -> float:
    """The peak memory in MiB: the GPU's if `device` is one, since it was last reset, else that of
    this process. `mps` counts no peak: there it is the memory that torch holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
