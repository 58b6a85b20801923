"""What a file is that should have been another one, in words that fit on a line."""

import zipfile
from pathlib import Path


def one_line(text: object) -> str:
    """Words of others, of which a file may have made any length and any number of lines."""
    words = "".join(c if c.isprintable() else " " for c in f"{text!s:.1000}")
    return " ".join(words.split())[:200]


def describe(path: Path) -> str:
    """A few words on a file that is not what was wanted, with its size."""
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return f"an empty file of {size}"
    if start.startswith((b"<!", b"<html", b"<head", b"<?xml")):
        return f"a web page of {size}, probably a server's error message"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} without the file itself (git lfs pull brings it)"
    if start.startswith(b"pk\3\4") and not zipfile.is_zipfile(path):
        return f"an archive cut short at {size}"
    return f"another file of {size}"
