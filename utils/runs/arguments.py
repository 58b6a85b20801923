"""Types of command-line values, which refuse what is out of range; and the arguments of a run."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError

VALUE_LENGTH = 60  # characters of a refused value that its message shows


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


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return _parse(text, float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def path(text: str) -> Path:
    """A path, `~` being the user's home."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        message = f"{text:.{VALUE_LENGTH}}: that home folder is unknown"
        raise argparse.ArgumentTypeError(message) from None


def name_or_path(text: str) -> str:
    """A model's name as it is, or a path, `~` being the user's home."""
    expanded = path(text)
    return str(expanded) if text.startswith("~") else text


def starting_point(text: str) -> str:
    """A model's name or a path as it is, but for a run's folder the checkpoint in it."""
    text = name_or_path(text)
    checkpoint = Path(text) / "weights" / "checkpoint.pth"
    return str(checkpoint) if checkpoint.is_file() else text


def _parse(text: str, kind: type, is_in_range: Callable, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_in_range(value):
        raise argparse.ArgumentTypeError(f"{text:.{VALUE_LENGTH}} is not {wanted}")
    return value


class TrainedOn(NamedTuple):
    """The data that a run was trained on."""

    dataset_path: Path
    languages: list[str]


def run_folder(weights: str | Path) -> Path | None:
    """The run that a weights file, `RUN/weights/<file>`, belongs to; None if it belongs to none."""
    file = Path(weights).expanduser().resolve()
    run = file.parent.parent
    return run if file.is_file() and (run / "arguments.json").is_file() else None


def trained_on(weights: str | Path) -> TrainedOn | None:
    """The data set and the languages that the run of a weights file was trained on; None if the
    file belongs to no run. Raises `InputError` for an arguments.json that does not say."""
    run = run_folder(weights)
    if run is None:
        return None
    file = run / "arguments.json"
    try:
        arguments = json.loads(file.read_text(encoding="utf-8"))
        languages = arguments["language"]
        languages = [languages] if isinstance(languages, str) else [str(la) for la in languages]
        return TrainedOn(Path(arguments["dataset_path"]), languages)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f"{file}: should hold the dataset_path and language of its run, but cannot be used; "
            "give both, or mend it"
        ) from None
