"""Memory: how much there is, the most that was taken, and errors that say what to do when it is
full."""

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
SHARED_MEMORY = "/dev/shm"  # where Linux keeps the memory that processes share


@contextmanager
def explained(remedies: str = "") -> Iterator[None]:
    """Turn the errors of full memory, on the GPU or not, into an `InputError` that names the
    arguments that help: those that every script with a batch has, and before them `remedies`, such
    as `IN_TRAINING`. Also decorates functions."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        # The second text is that of `mps`.
        if is_memory or any(t in str(error) for t in ("can't allocate memory", "out of memory")):
            raise InputError(
                f"memory is full: {remedies}lower --batch_size or --num_workers; {CONTINUE}"
            ) from error
        raise


def check_images_fit(n: int, side: int, device: torch.device) -> None:
    """Raise `InputError` if n float32 images, `side` pixels wide and high, are more than all the
    memory of the device. What the towers make of them comes on top, and is not known here."""
    size, total = n * 3 * side**2 * 4, total_memory(device)
    if size > total:
        raise InputError(
            f"--input_shape {side}: {n} images at once take {size / 2**30:,.1f} GB as floats "
            f"alone, where {device} has {total / 2**30:,.1f} GB; lower it, or --batch_size, or "
            "compute the batch in parts (--grad_cache 16)"
        )


def total_memory(device: torch.device) -> int:
    """The memory of a GPU with CUDA, or else of this machine, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if sys.platform == "win32":
        import psutil

        return psutil.virtual_memory().total
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_shared_memory() -> int | None:
    """How many bytes processes can share besides those they do; None where that has no limit of
    its own. (A container of Docker has 64 MB in all.)"""
    if not os.path.isdir(SHARED_MEMORY):  # noqa: PTH112 - a Path of Windows has no statvfs
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def peak_memory_mb(device: torch.device) -> float:
    """The most memory taken so far, in MiB: the GPU's if `device` is one, else this process's. For
    `mps`, which counts no peak, it is what torch has reserved and not yet given back."""
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
