"""The processes that train one model together, as torchrun starts them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from models.device import pick_device
from models.errors import InputError

T = TypeVar("T")
# Variables that tell how many processes a launcher has started side by side.
LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
LONGEST_WAIT = timedelta(hours=12)  # for the first process, which downloads, checks and decodes


class Share(NamedTuple):
    """The rows `start` to `stop`, of `total`, that one process works on."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, `[total * k, ...]`, from this one's, `[len(self) * k, ...]`.

        In the backward pass the gradient of this process's rows is the sum of the gradients that
        all processes have for them.
        """
        return rows if len(self) == self.total else _Gather.apply(rows, self)


class Processes(NamedTuple):
    """This process, number `rank` of `size`. One alone exchanges nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, n: int) -> Share:
        """This process's part of n rows; parts differ by one row at most."""
        return Share(self.rank * n // self.size, (self.rank + 1) * n // self.size, n)

    def share_with(self, n: int) -> Share:
        """The share of a process that holds n rows; the others may hold other numbers."""
        if self.size == 1:
            return Share(0, n, n)
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = n
        ends = self.sum(counts).cumsum(0).tolist()
        return Share(ends[self.rank] - n, ends[self.rank], ends[-1])

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place the sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, condition: bool) -> bool:
        """Whether `condition` holds in any process; exchanged between CPUs, so no GPU waits."""
        return bool(self.sum(torch.tensor(int(condition))).item())

    def from_first(self, value: T) -> T:
        """The first process's `value`, in all processes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first process runs the block, then the others do: they find the files it has made."""
        if not self.is_first:
            self.any(False)
        yield
        if self.is_first:
            self.any(False)


ALONE = Processes()


def join_processes(device: str | None) -> tuple[Processes, torch.device]:
    """This process's place among those that torchrun has started, and the device it computes on:
    with CUDA each process of a machine takes a GPU of its own. Alone: `ALONE` and the device.
    Raises `InputError` for processes that another launcher has started, which are not joined.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if "WORLD_SIZE" not in os.environ:
        for name, launcher in LAUNCHERS.items():
            if os.environ.get(name, "1") != "1":
                raise InputError(
                    f"{launcher} has started {os.environ[name]} processes, which would train a run "
                    f"each: have it start torchrun once a machine, torchrun train.py ..., which "
                    "joins its processes; if each is to train alone, set WORLD_SIZE=1"
                )
    if size == 1:
        return ALONE, pick_device(device)
    local = int(os.environ["LOCAL_RANK"])
    if device is None and not torch.cuda.is_available():
        device = "cpu"  # several processes cannot share a Mac's GPU
    if device in (None, "cuda"):
        if local >= torch.cuda.device_count():
            raise InputError(
                f"torchrun --nproc_per_node: more processes than the {torch.cuda.device_count()} "
                "GPUs of this machine; start one a GPU, or add --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    picked = pick_device(device)
    if picked.type == "mps":
        raise InputError("--device mps: several processes cannot share a Mac's GPU; start one "
                         "process without torchrun, or add --device cpu")  # fmt: skip
    if picked.type == "cuda" and picked.index != local:
        raise InputError(f"--device {device}: leave it out, torchrun gives each process its GPU")
    backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    processes = Processes(dist.get_rank(), size)
    if not processes.is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
    return processes, picked


class _Gather(torch.autograd.Function):
    """All rows, of which each process has some; backward: the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, rows: Tensor, share: Share) -> Tensor:
        k = len(rows) // len(share)
        ctx.own = slice(share.start * k, share.stop * k)
        everyone = rows.new_zeros(share.total * k, *rows.shape[1:])
        everyone[ctx.own] = rows
        dist.all_reduce(everyone)
        return everyone

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own], None
