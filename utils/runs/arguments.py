"""Types of command-line values, which refuse what is out of range; and the arguments of a run."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError
from models.files import read_bytes, run_weights
from models.scripts import (
    VALUE_LENGTH,
    add_activation,
    checked,
    path,
    writable_file,
)
from utils.runs.files import picture_format

ARGUMENTS_LENGTH = 2**20  # bytes of an arguments.json
LARGEST = 10**9  # of the numbers whose size has no limit of its own


def _parse(kind: type, is_in_range: Callable, wanted: str, text: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_in_range(value):
        raise argparse.ArgumentTypeError(f"{text:.{VALUE_LENGTH}} is not {wanted}")
    return value


def integer(minimum: int, maximum: int = LARGEST) -> Callable[[str], int]:
    """An integer from `minimum` to `maximum`."""
    return partial(
        _parse, int, lambda n: minimum <= n <= maximum, f"an integer from {minimum} to {maximum:,}"
    )


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
    """A model's name or a weights file as it is, but for a run's folder the weights it chose."""
    text = name_or_path(text)
    return str(run_weights(Path(text)) or text)


def starting_point(text: str) -> str:
    """A model's name or a path as it is, but for a run's folder the checkpoint in it."""
    text = name_or_path(text)
    checkpoint = Path(text) / "weights" / "checkpoint.pth"
    return str(checkpoint) if checkpoint.is_file() else text


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all scripts have which compute with weights, but for train.py."""
    add_activation(parser)
    parser.add_argument(
        "--use_amp",
        action="store_true",
        help="mixed precision, faster on a GPU, and on a CPU that computes in bfloat16: bfloat16 "
        "where the device has it, else float16; similarities stay float32",
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the first there is)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all scripts have which score weights."""
    parser.add_argument("--batch_size", type=integer(1), default=64, help="images at a time")
    parser.add_argument("--num_workers", type=workers, default=0, help="processes that read images")
    add_loading(parser)


class TrainedOn(NamedTuple):
    """The data that a run was trained on."""

    dataset_path: Path
    languages: list[str]


def run_folder(weights: str | Path) -> Path | None:
    """The run that a weights file, `RUN/weights/<file>`, belongs to, or whose folder `weights` is;
    None if there is none."""
    weights = Path(weights).expanduser().resolve()
    run = weights.parent.parent if weights.is_file() else weights
    return run if (run / "arguments.json").is_file() else None


def trained_on(weights: str | Path) -> TrainedOn | None:
    """The data set and the languages that the run of `weights` was trained on; None if they belong
    to no run. Raises `InputError` for an arguments.json that does not say."""
    run = run_folder(weights)
    if run is None:
        return None
    file = run / "arguments.json"
    try:
        arguments = saved_arguments(run)
        languages = arguments["language"]
        languages = [languages] if isinstance(languages, str) else [str(la) for la in languages]
        return TrainedOn(Path(arguments["dataset_path"]), languages)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f"{file}: should hold the dataset_path and language of its run, but cannot be used; "
            "give both, or mend it"
        ) from None


def saved_arguments(run: Path) -> dict[str, object]:
    """The arguments of a run, from its arguments.json. Raises `InputError` for a file of anything
    else."""
    file = run / "arguments.json"
    try:
        arguments = json.loads(read_bytes(file, ARGUMENTS_LENGTH))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"{file}: should hold the arguments of its run; mend it or remove it")
    return arguments
