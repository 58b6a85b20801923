"""Types of command-line values, and the arguments that several scripts share."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.run_files import CHECKPOINT, run_weights
from models.scripts import add_activation, checked, path, writable_file
from utils.runs.default_weights import PUBLISHED
from utils.runs.files import picture_format

LARGEST = 10**9  # of numbers without a narrower limit


def _within(kind: type, wanted: str, is_in_range: Callable[[float], bool]) -> Callable[[str], Any]:
    """The type of an argument that is `wanted`."""

    def parse(text: str):
        with suppress(ValueError):
            if is_in_range(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text:.60} is not {wanted}")

    return parse


def integer(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    wanted = f"an integer from {minimum} to {maximum:,}"
    return _within(int, wanted, lambda n: minimum <= n <= maximum)


def number(minimum: float = 0.0, below: float = LARGEST) -> Callable[[str], float]:
    wanted = f"a number of at least {minimum:g} and below {below:,}"
    return _within(float, wanted, lambda x: minimum <= x < below)


positive = _within(float, f"a number above 0 and below {LARGEST:,}", lambda x: 0 < x < LARGEST)
fraction = _within(float, "a number from 0 to 1", lambda x: 0 <= x <= 1)
workers = integer(0, 256)  # processes that read images; more fill the memory with Python alone


def shards(text: str) -> str:
    """A pattern of webdataset's; a path is made absolute, so that a run goes on from any folder."""
    return text if is_remote(text) else str(Path(text).expanduser().absolute())


def is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def picture(text: str) -> Path:
    """The path of a picture to write, checked before anything is computed for it."""
    return checked(writable_file(text), picture_format)


def _ending_in(*endings: str) -> Callable[[str], Path]:
    """The type of the path of a file to write, checked before anything is computed for it."""

    def parse(text: str) -> Path:
        if (file := writable_file(text)).suffix.lower() in endings:
            return file
        names = " or ".join(endings)
        raise argparse.ArgumentTypeError(f"{text:.60}: name a file that ends in {names}")

    return parse


answer_file = _ending_in(".csv", ".jsonl")


def feature_file(text: str) -> Path:
    file = _ending_in(".npy", ".parquet")(text)
    if file.suffix.lower() == ".parquet" and not find_spec("pyarrow"):
        raise argparse.ArgumentTypeError(
            f"{text:.60}: needs pyarrow (pip install pyarrow); or name a file that ends in .npy"
        )
    return file


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
    add = parser.add_argument
    # fmt: off
    add("--weights", type=trained_weights, metavar="NAME_OR_PATH",
        help="model name, whose weights are downloaded if needed, weights file, or run's folder "
        "(default: what the newest run in logs/ chose, here or else beside the scripts; "
        f"{PUBLISHED} where there is no run)")
    add_activation(parser)
    add("--use_amp", action="store_true",
        help="mixed precision, faster on a GPU, and on a CPU that computes in bfloat16: bfloat16 "
        "where the device has it, else float16; similarities stay float32")
    # fmt: on
    add("--device", help="cuda, cuda:1, mps or cpu (default: the first there is)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of all scripts that score weights."""
    add = parser.add_argument
    add("--batch_size", type=integer(1), default=64, help="images at a time (default: %(default)s)")
    add("--num_workers", type=workers, default=0, help="processes that read images (default: 0)")
    add_loading(parser)
