"""The processes that train one model together, as torchrun or SLURM's srun starts them."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar
from uuid import getnode

import torch
import torch.distributed as dist
from torch import Tensor

from models.device import pick_device
from models.errors import InputError
from utils.machine.mapped import map_arrays, write_arrays

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=12)  # for rank 0, which downloads, checks and decodes


class Shard(NamedTuple):
    """The rows `start` to `stop`, of `total`, that one process works on."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, `[total * k, ...]`, from this one's, `[len(self) * k, ...]`. In the
        backward pass, all processes' gradients for this one's rows are summed."""
        return rows if len(self) == self.total else _Gather.apply(rows, self)


class Processes(NamedTuple):
    """This process, number `rank` of `size`. One alone exchanges nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def shard(self, n: int) -> Shard:
        """This process's part of n rows; parts differ by one row at most."""
        return Shard(self.rank * n // self.size, (self.rank + 1) * n // self.size, n)

    def shard_with(self, n: int) -> Shard:
        """The shard of a process that has n rows; the others may have other numbers."""
        if self.size == 1:
            return Shard(0, n, n)
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = n
        ends = self.sum(counts).cumsum(0).tolist()
        return Shard(ends[self.rank] - n, ends[self.rank], ends[-1])

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, condition: bool) -> bool:
        """Whether `condition` holds in any process. CPUs exchange it, so no GPU waits."""
        return bool(self.sum(torch.tensor(int(condition))).item())

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, in all processes."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def shared(self, compute: Callable[[], T]) -> T:
        """What `compute` returns, or the `InputError` that it raises: one process of each machine
        computes it, and its arrays are in memory once for all of them."""
        if self.size == 1:
            return compute()
        machines = self._gathered((gethostname(), getnode()))
        first = machines.index(machines[self.rank])
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file, error = Path(folder) / "shared", None
            if self.rank == first:
                try:
                    write_arrays(compute(), file)
                except InputError as raised:
                    error = raised
            file, error = self._gathered((str(file), error))[first]
            value = None if error else map_arrays(file)
            self.any(False)  # until all have opened the file
        if error:
            raise error
        return value

    def _gathered(self, value: T) -> list[T]:
        """The values of all processes."""
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Rank 0 runs the block first; then the others run it and find the files it has made."""
        if not self.is_rank_0:
            self.any(False)
        yield
        if self.is_rank_0:
            self.any(False)


ALONE = Processes()


def join_processes(device: str | None) -> tuple[Processes, torch.device]:
    """This process's place among those of torchrun or srun, and its device, a GPU each."""
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        os.environ.update(torchrun_variables(os.environ))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "LOCAL_RANK" not in os.environ:
        return ALONE, pick_device(device)
    local = int(os.environ["LOCAL_RANK"])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cuda", "cpu"):
        raise InputError(f"--device {device}: of several processes each takes a GPU of its own: "
                         "leave it out, or add --device cpu")  # fmt: skip
    backend = "gloo"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"{local + 1} processes or more, where this one finds {torch.cuda.device_count()} "
                "GPUs: start one a GPU (torchrun --nproc_per_node), or add --device cpu"
            )
        device, backend = f"cuda:{local}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=LONGEST_WAIT)
    processes = Processes(dist.get_rank(), size)
    if not processes.is_rank_0:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for as long as the process lives
    return processes, torch.device(device)


def torchrun_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun from those of SLURM (man page of srun, "OUTPUT ENVIRONMENT
    VARIABLES"). Unless the user sets the address and the port of rank 0, they are the first machine
    of the list, such as "gpu[03-04,7],login", and a port that other jobs on it hardly use."""
    start, numbers, end = re.match(r"([^,\[]*)(?:\[(\d+)[^]]*\]([^,\[]*))?",
                                   slurm["SLURM_STEP_NODELIST"]).groups("")  # fmt: skip
    of_step = int(slurm["SLURM_JOB_ID"]) + 101 * int(slurm["SLURM_STEP_ID"])
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        # With --gpus-per-task a process sees its own GPUs alone.
        "LOCAL_RANK": "0" if "SLURM_GPUS_PER_TASK" in slurm else slurm["SLURM_LOCALID"],
        "MASTER_ADDR": slurm.get("MASTER_ADDR", start + numbers + end),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(15000 + of_step % 10000)),
    }


class _Gather(torch.autograd.Function):
    """All processes' rows; backward: the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, rows: Tensor, shard: Shard) -> Tensor:
        k = len(rows) // len(shard)
        ctx.own = slice(shard.start * k, shard.stop * k)
        everyone = rows.new_zeros(shard.total * k, *rows.shape[1:])
        everyone[ctx.own] = rows
        dist.all_reduce(everyone)
        return everyone

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[ctx.own], None
