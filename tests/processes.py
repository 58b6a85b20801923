"""Several processes that compute together, as torchrun would start them."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from utils.ranks import join_ranks


def in_ranks(size: int, function: Callable, *arguments: object) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `size` processes, rank by rank."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    port = 20000 + os.getpid() % 20000 + size
    processes = [
        context.Process(target=_run, args=(rank, size, port, results, function, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    returned = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [returned[rank] for rank in range(size)]


def _run(rank, size, port, results, function, arguments) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    ranks, _ = join_ranks("cpu")
    results.put((rank, function(ranks, *arguments)))
