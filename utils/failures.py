"""What ends a run that has nothing wrong with it: full memory, a process that is killed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.errors import InputError

GO_ON = "a run goes on with --resume_training RUN/weights/checkpoint.pth"


@contextmanager
def explained() -> Iterator[None]:
    """Raise `InputError` with the arguments that help for memory that is full, on the GPU or not,
    and for a worker process that was killed. Also decorates functions."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if is_memory or "can't allocate memory" in text:
            raise InputError(
                "memory is full: compute the batch in parts (--grad_cache 16), or add --use_amp or "
                f"--grad_checkpointing, or lower --batch_size or --num_workers; {GO_ON}"
            ) from error
        if "DataLoader worker" in text:
            raise InputError(
                "a process that reads images was killed, as a rule because main memory is full: "
                f"lower --num_workers or --batch_size; {GO_ON}"
            ) from error
        raise
