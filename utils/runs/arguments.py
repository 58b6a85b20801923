"""Types of command-line values, and the arguments that several scripts share."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from models.run_files import CHECKPOINT, run_weights
from models.scripts import add_activation, checked, path, writable_file
from utils.runs.files import picture_format

LARGEST = 10**9  # of numbers without a narrower limit


def _parse(kind: type, is_in_range: Callable, wanted: str, text: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_in_range(value):
        raise argparse.ArgumentTypeError(f"{text:.60} is not {wanted}")
    return value


def integer(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    """An integer from `minimum` to `maximum`."""
    wanted = f"an integer from {minimum} to {maximum:,}"
    return partial(_parse, int, lambda n: minimum <= n <= maximum, wanted)


workers = integer(0, 256)  # processes that read images; more fill the memory with Python alone


def number(minimum: float = 0.0, below: float = LARGEST) -> Callable[[str], float]:
    """A number of at least `minimum` and below `below`."""
    wanted = f"a number of at least {minimum:g} and below {below:,}"
    return partial(_parse, float, lambda x: minimum <= x < below, wanted)


def positive(text: str) -> float:
    """A number above 0 and below `LARGEST`."""
    wanted = f"a number above 0 and below {LARGEST:,}"
    return _parse(float, lambda x: 0 < x < LARGEST, wanted, text)


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _parse(float, lambda x: 0 <= x <= 1, "a number from 0 to 1", text)


def picture(text: str) -> Path:
    """The path of a picture to write, checked before anything is computed for it."""
    return checked(writable_file(text), picture_format)


def name_or_path(text: str) -> str:
    """A model's name as it is, or a path, `~` being the user's home."""
    expanded = path(text)
    return str(expanded) if text.startswith("~") else text


def trained_weights(text: str) -> str:
    """A model's name or a weights file; of a run's folder, the weights that count."""
    text = name_or_path(text)
    return str(run_weights(Path(text)) or text)


def starting_point(text: str) -> str:
    """A model's name or a path; of a run's folder, its checkpoint."""
    text = name_or_path(text)
    checkpoint = Path(text) / CHECKPOINT
    return str(checkpoint) if checkpoint.is_file() else text


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all scripts that load weights, except train.py."""
    add_activation(parser)
    parser.add_argument(
        "--use_amp",
        action="store_true",
        help="mixed precision, faster on a GPU, and on a CPU that computes in bfloat16: bfloat16 "
        "where the device has it, else float16; similarities stay float32",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first there is)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all scripts that score weights."""
    parser.add_argument("--batch_size", type=integer(1), default=64, help="images at a time")
    parser.add_argument("--num_workers", type=workers, default=0, help="processes that read images")
    add_loading(parser)
