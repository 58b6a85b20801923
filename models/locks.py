"""Locks, for what one program at a time may do."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout


def lock(file: Path, waiting: str) -> AbstractContextManager:
    """The lock on `file`, once no other program holds it; `waiting` is printed if one does. The
    system frees it when a program ends, however it ends; the empty file may stay, and hinders no
    one. Raises `OSError` if the file cannot be made, and `NotImplementedError` for a file system
    without locks."""
    found = FileLock(file)
    try:
        return found.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr)
        return found.acquire()
