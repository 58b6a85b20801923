"""Atomic writes: a file appears under its final name whole, or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import InputError

TEMPORARY = ".unfinished."  # start of the names of files that are being written


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`. After the block, that file is flushed to the disk and
    renamed to `path`; if the block raises, it is deleted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY + secrets.token_hex(4))  # short, however long `path`
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn errors of writing into an `InputError` that names `path` and says how to go on."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); what stood there is kept. "
            "Make room, or choose another folder, and run this again; a run goes on with: "
            "python train.py --resume_training logs/RUN"
        ) from error


def picture_format(path: Path) -> str:
    """matplotlib's format for a suffix; PNG without one. Raises `InputError` for another."""
    from matplotlib.backend_bases import FigureCanvasBase

    kind = path.suffix.lstrip(".").lower() or "png"
    known = FigureCanvasBase.filetypes.keys() - {"pgf"}  # needs LaTeX
    if kind not in known:
        raise InputError(f"{path}: no format for pictures; those are {', '.join(sorted(known))}")
    return kind
