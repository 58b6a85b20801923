"""Several processes that compute together, as torchrun would start them."""

import os
import pickle
from collections.abc import Callable
from typing import Any

from script_runs import forks
from torch.distributed import TCPStore

from utils.machine.processes import join_processes


def in_processes(size: int, function: Callable, *arguments: object) -> list[Any]:
    """What `function(processes, *arguments)` returns in each of `size` processes, first to last."""
    context = forks()
    results = context.Queue()
    store = new_store()
    children = [
        context.Process(target=_run, args=(rank, size, store.port, results, function, arguments))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    returned = dict(pickle.loads(results.get(timeout=120)) for _ in children)
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [returned[rank] for rank in range(size)]


def new_store() -> TCPStore:
    """The store in which processes find each other, as torchrun provides one, at a free port."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _run(rank, size, port, results, function, arguments) -> None:
    as_rank(rank, size, port)
    processes, _ = join_processes("cpu")
    # Not as tensors, whose memory would have to be fetched before this process ends.
    results.put(pickle.dumps((rank, function(processes, *arguments))))


def as_rank(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process of this rank, whose store is at `port` of this machine."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # do not start a store of one's own
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
