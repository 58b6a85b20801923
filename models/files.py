"""Checks and reading of files that users name."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.errors import InputError, naming, one_line


def probably_meant(name: str, others: Iterable[str]) -> str:
    """A hint for a message: one of `others` in another case or with an ending, or nothing."""
    for other in others:
        if name and name.casefold() in (other.casefold(), other.rpartition(".")[0].casefold()):
            return f" (there is {other})"
    return ""


def file_version(path: Path) -> str:
    """The size and times of the file at `path`, which differ after a change."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a link to nothing; an impossible name
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def check_writable(path: Path) -> None:
    """Raise `InputError` if no file can be written at `path`. Its folder need not exist."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is a folder or a device, not a file; name a file")
    check_writable_folder(path.parent)


def check_writable_folder(folder: Path) -> None:
    """Raise `InputError` if nothing can be written into `folder`, which need not exist."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: cannot be written (nothing may be written into {there.resolve()}); name "
            "another folder"
        )


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None without a file. An `InputError` starts with its name."""
    if not file.exists():
        return None
    with naming(file.name):
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InputError(f"broken JSON ({one_line(error)})") from None
        if not isinstance(content, dict):
            raise InputError("should hold a description, in braces")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def decoded(content: bytes, file: object) -> str:
    """The text of a UTF-8 file with this content. Raises `InputError` for anything else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}; save it as UTF-8 (in Excel: CSV UTF-8)"
        if content.startswith(b"PK"):
            problem = "is a workbook of Excel, or a zip; save it as CSV UTF-8"
        raise InputError(f"{file}: {problem}") from None


def read_lines(path: Path, kind: str) -> list[str]:
    """The lines of a UTF-8 text file with one `kind`, such as "caption", a line: stripped, without
    blank lines. Unicode's other separators end no line. Raises `InputError` if no line is left."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; write one {kind} a line")
    text = decoded(path.read_bytes(), path)
    lines = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    if not lines:
        raise InputError(f"{path}: no {kind}s in it; write one on each line")
    return lines


def describe(path: Path) -> str:
    """The kind of a wrong file, identified by its first bytes, and its size."""
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(256)
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return f"an empty file of {size}"
    if start.startswith((b"<!", b"<html", b"<head", b"<?xml")):
        return f"a web page of {size}, probably a server's error message"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} without the file itself (git lfs pull brings it)"
    return f"another file of {size}"
