"""Where the scripts lie, and with them the files that they take where none are named; and the
argument that all of them have. Imports no torch, so that `--help` answers at once."""

import argparse
from pathlib import Path

from models.weights.config import CHOICES

SCRIPTS = Path(__file__).resolve().parents[1]


def from_here(name: str) -> Path:
    """The path from the working folder of a file beside the scripts, such as `train.py` or
    `flickr8k`: the name alone where one stands beside them, else a whole path."""
    return Path(name) if Path.cwd() == SCRIPTS else SCRIPTS / name


def add_activation(parser: argparse.ArgumentParser) -> None:
    """Add `--activation`, which says what a bare state dict does not."""
    parser.add_argument(
        "--activation", choices=CHOICES["activation"], help="of weights that do not tell it"
    )
