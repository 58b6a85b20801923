"""What a file is that should have been another one."""

import zipfile
from pathlib import Path


def describe(path: Path) -> str:
    """A few words on a file that is not what was wanted, with its size."""
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(256).lstrip().lower()
    if not start:
        return f"an empty file of {size}"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return f"a web page of {size}, probably a server's error message"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} without the file itself (git lfs pull brings it)"
    if start.startswith(b"pk\3\4") and not zipfile.is_zipfile(path):
        return f"an archive cut short at {size}"
    return f"another file of {size}"
