"""Files that users name. A pipe could wait for ever and a device never end, so that only regular
files are read, and those that are read whole only up to a size; and only they are replaced."""

import io
import os
import re
import sys
import zipfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from models.errors import InputError

OTHER_PROGRAMS = {  # how their files start
    re.compile(rb"GGUF"): "a GGUF file (llama.cpp's)",
    re.compile(rb"\x89HDF\r\n"): "an HDF5 file (of Keras and TensorFlow)",
    re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x3a]"): "an ONNX model",
}

LARGEST = 2**30  # bytes of a file that is read whole: captions of millions of images are less


def probably_meant(name: str, others: Iterable[str]) -> str:
    """A hint for messages at a file `name` that is not there, in brackets: the one of `others` that
    is spelled in other cases, or has an ending besides. Empty if there is none."""
    for other in others:
        if other.casefold() == name.casefold():
            return f" (there is {other}: upper and lower case differ)"
        if other.rpartition(".")[0].casefold() == name.casefold() != "":
            return f" (there is {other}: the name needs its ending)"
    return ""


def file_version(path: Path) -> str:
    """What changes when the file at `path` does, or is replaced: its size and times. A file that is
    put there with the same size and `st_mtime` has another `st_ctime`, but for Windows, where that
    is the time of creation."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # a link to nothing; an impossible name
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def check_regular(path: Path) -> None:
    """Raise `InputError` if what stands at `path` is no regular file; nothing need stand there."""
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise InputError(f"{path}: is {kind}, not a file; name a file")


def check_writable(path: Path) -> None:
    """Raise `InputError` if no file can be written at `path`, whose folder need not be there."""
    try:
        check_regular(path)
        path.lstat()  # raises for a name that is too long
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    check_writable_folder(path.parent)


def check_writable_folder(folder: Path) -> None:
    """Raise `InputError` if nothing can be written into `folder`, which need not be there."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"{folder}: cannot be written ({there} is no folder); name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder}: cannot be written (nothing may be written into {there.resolve()}); name "
            "another folder"
        )


def check_size(path: object, size: int, largest: int = LARGEST) -> None:
    """Raise `InputError` if `size`, in bytes, is more than `largest`."""
    if size > largest:
        raise InputError(
            f"{path}: {size / 1e6:,.0f} MB, where at most {largest / 1e6:,.0f} MB are read; is it "
            "the right file?"
        )


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a file. Raises `InputError` for a folder, a pipe, a device, and for a file of
    more than `largest` bytes; `OSError` for one that cannot be read."""
    check_regular(path)
    check_size(path, path.stat().st_size, largest)
    return path.read_bytes()


def decoded(content: bytes, file: object) -> str:
    """The text of a UTF-8 file with this content. Raises `InputError`, which names the `file` and
    says what to do, for anything else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 at byte {error.start}; save it as UTF-8 (in Excel: CSV UTF-8)"
        if content.startswith(b"PK"):
            problem = "is a workbook of Excel, or a zip; save it as CSV UTF-8"
        raise InputError(f"{file}: {problem}") from None


def read_lines(path: Path, kind: str) -> list[str]:
    """The lines of a UTF-8 text file that has one `kind`, such as "caption", on each; without blank
    ones and the white space around them. A line ends where an editor ends it, and not at the other
    separators of Unicode, which texts hold. Raises `InputError` if there are none."""
    try:
        text = decoded(read_bytes(path), path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; write one {kind} a line") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    lines = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
    if not lines:
        raise InputError(f"{path}: no {kind}s in it; write one on each line")
    return lines


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


def describe(path: Path) -> str:
    """A few words on a file that is not what was wanted, with its size."""
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(256)
    if start.startswith(b"PK\3\4") and _names_in_archive(path) is None:
        return f"an archive cut short at {size}"
    for pattern, program in OTHER_PROGRAMS.items():
        if pattern.match(start):
            return f"{program} of {size}"
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return f"an empty file of {size}"
    if start.startswith((b"<!", b"<html", b"<head", b"<?xml")):
        return f"a web page of {size}, probably a server's error message"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} without the file itself (git lfs pull brings it)"
    return f"another file of {size}"


def _names_in_archive(path: Path) -> list[str] | None:
    """The names of the files in a zip archive; None if it is damaged, or no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except OSError:
        raise
    except Exception:  # a damaged archive can break the reader in any way
        return None
