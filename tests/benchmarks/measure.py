"""What the benchmarks share: taking turns, and tables for the README beside this file.

Importing it lets a benchmark import the repository's packages, and `peers` and `published`. It does
not import torch, so that `cold_start.py` stays small.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tqdm import tqdm  # noqa: E402

Seconds = dict[str, list[float]]


def alternate(
    contestants: dict[str, Callable[[Any], object]],
    rounds: Iterable,
    finish: Callable[[], object] = lambda: None,
) -> Seconds:
    """Wall-clock seconds of each contestant in each round.

    Every contestant is called with every item of `rounds`; whoever came first in a round comes last
    in the next, so that neither a busy machine nor the order favours one. `finish` waits for a
    device. The first round, in which memory is got and code is loaded, is not counted.
    """
    names = list(contestants)
    seconds: Seconds = {name: [] for name in names}
    for item in tqdm(rounds, desc="rounds", leave=False):
        for name in names:
            finish()
            start = time.perf_counter()
            contestants[name](item)
            finish()
            seconds[name].append(time.perf_counter() - start)
        names.append(names.pop(0))
    return {name: values[1:] for name, values in seconds.items()}


def times_as_fast(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times faster ours is: the median over the rounds of their seconds by ours."""
    return f"{median(b / a for a, b in zip(ours, theirs, strict=True)):.2f}"


def check(what: str, differences: Iterable[float], tolerance: float) -> None:
    """Print the largest difference; raise `ArithmeticError` if any is larger than `tolerance`, or
    NaN."""
    differences = list(differences)
    print(f"{what} differ by at most {max(differences):.1e}")
    wrong = [difference for difference in differences if not difference <= tolerance]
    if wrong:
        raise ArithmeticError(f"{what} differ by {wrong[0]:.1e}, more than {tolerance:.0e}")


def relative_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """The differences between gradients, each by the gradient's norm. A thousandth of the largest
    norm is added to it: some gradients are zero but for rounding (that of a key's bias)."""
    largest = max(gradient.norm().item() for gradient in theirs.values())
    return [
        ((ours[name] - gradient).norm() / (gradient.norm() + 1e-3 * largest)).item()
        for name, gradient in theirs.items()
    ]


def matmul(side: int, dtype, device) -> Callable[[Any], object]:
    """A contestant that multiplies two square matrices: `2 * side**3` operations."""
    import torch

    a, b = torch.randn(2, side, side, device=device).to(dtype)
    product = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=product)


def in_a_process(function: Callable, *arguments: object) -> Any:
    """The result of a function that has a GPU, or the memory of a process, to itself."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def extra_peak_megabytes(function: Callable[[], object]) -> float:
    """Memory of this process at its peak while `function` runs, beyond that before. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status_megabytes("VmRSS")
    function()
    return _status_megabytes("VmHWM") - before


def _status_megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table: the first column to the left, numbers to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (lines[0], rule, *lines[1:]):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print(f"| {' | '.join(cells)} |")
    print()


def describe_cpu() -> str:
    """The processor and the threads that torch uses on it."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else "CPU"
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
