"""Where the scripts lie, and with them the files that they take where none are named."""

from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]


def from_here(name: str) -> Path:
    """The path from the working folder of a file beside the scripts, such as `train.py` or
    `flickr8k`: the name alone where one stands beside them, else a whole path."""
    return Path(name) if Path.cwd() == SCRIPTS else SCRIPTS / name
