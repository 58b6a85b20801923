"""Types of command-line values: a number out of range is refused with the range."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An integer of at least `minimum`, and at most `maximum`."""
    upper = "" if maximum is None else f" and at most {maximum}"

    def parse(text: str) -> int:
        return _parse(
            text,
            int,
            lambda n: n >= minimum and (maximum is None or n <= maximum),
            f"an integer of at least {minimum}{upper}",
        )

    return parse


def number(minimum: float = 0.0, below: float = math.inf) -> Callable[[str], float]:
    """A finite number of at least `minimum` and below `below`."""
    upper = "" if math.isinf(below) else f" and below {below:g}"

    def parse(text: str) -> float:
        return _parse(
            text, float, lambda x: minimum <= x < below, f"a number of at least {minimum:g}{upper}"
        )

    return parse


def positive(text: str) -> float:
    """A finite number above zero."""
    return _parse(text, float, lambda x: 0 < x < math.inf, "a number above 0")


def path(text: str) -> Path:
    """A path, `~` being the user's home."""
    return Path(text).expanduser()


def _parse(text: str, kind: type, is_in_range: Callable, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_in_range(value):
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value
