"""Memory: the most that was taken, and errors that say what to do when it is full."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.errors import InputError

CONTINUE = "a run of train.py goes on with --resume_training RUN/weights/checkpoint.pth"
IN_TRAINING = (
    "compute the batch in parts (--grad_cache 16), or add --use_amp or --grad_checkpointing, or "
)


@contextmanager
def explained(remedies: str = "") -> Iterator[None]:
    """Turn the errors of full memory, on the GPU or not, and of a killed worker process into an
    `InputError` that names the arguments that help: those that every script with a batch has, and
    before them `remedies`, such as `IN_TRAINING`. Also decorates functions."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_memory or "can't allocate memory" in text:
            raise InputError(
                f"memory is full: {remedies}lower --batch_size or --num_workers; {CONTINUE}"
            ) from error
        if "DataLoader worker" in text:
            raise InputError(
                "a process that reads images was killed, as a rule because main memory is full: "
                f"lower --num_workers or --batch_size; {CONTINUE}"
            ) from error
        raise


def peak_memory_mb(device: torch.device) -> float:
    """The most memory taken so far, in MiB: the GPU's if `device` is one, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
