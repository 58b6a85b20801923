"""The argument parser of all scripts, types for paths, the scripts' folder; without torch."""

import argparse
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from models.config import CHOICES
from models.errors import InputError
from models.files import check_writable, check_writable_folder

SCRIPTS = Path(__file__).resolve().parents[1]


def from_here(name: str) -> Path:
    """The path of a file beside the scripts, such as `train.py` or `flickr8k`: its name alone if
    the scripts' folder is the working folder, else an absolute path."""
    return Path(name) if Path.cwd() == SCRIPTS else SCRIPTS / name


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with `--debug`. Help keeps the lines of the description, options cannot be
    abbreviated, and an error is an `InputError`, which corrects a mistyped option."""

    def __init__(self, **settings: object):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **settings)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            options = self._option_string_actions  # argparse has no public list of them
            near = difflib.get_close_matches(name, options, 1)
            advice = f"did you mean {near[0]}?" if near else "--help lists them"
            self.error(f"{name}: there is no such option; {advice}")
        return parsed

    def error(self, message: str) -> None:
        raise InputError(message)


def path(text: str) -> Path:
    """A path; `~` is the user's home, where it is known."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's raises for an unknown home


def writable_file(text: str) -> Path:
    """The path of a file to write, checked before anything is computed for it."""
    return checked(path(text), check_writable)


def writable_folder(text: str) -> Path:
    """The path of a folder to write into, checked before anything is computed for it."""
    return checked(path(text), check_writable_folder)


def checked(output: Path, check: Callable[[Path], object]) -> Path:
    """The path `output`, checked: an `InputError` of `check` becomes an error of argparse."""
    try:
        check(output)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return output


def add_activation(parser: argparse.ArgumentParser) -> None:
    """Add `--activation`, for a state dict without a description."""
    help_text = (
        "activation of the MLPs, needed for weights that come without a description of their "
        "model: quick_gelu for OpenAI's, MetaCLIP's and DFN's, gelu for most others"
    )
    parser.add_argument("--activation", choices=CHOICES["activation"], help=help_text)
