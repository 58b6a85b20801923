"""Downloads that end in a verified file, or in a message with the reason. Beside the file `NAME`,
`NAME.part` holds the bytes so far, and `NAME.lock` is locked by the process that writes them."""

import hashlib
import ssl
import sys
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock, Timeout

from models.errors import InputError, one_line
from models.files import describe
from models.progress_bar import progress_bar

CHUNK = 1 << 16  # bytes
TIMEOUT = 30  # seconds without a byte
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class Unavailable(InputError):
    """The address does not give the file: no server answers, or the server refuses."""


def download(url: str, path: Path, digest: str) -> Path:
    """The file at `path`, downloaded from `url` unless it exists, with an MD5 (32 hexadecimal
    digits) or a SHA-256 (64) as `digest`. Raises `Unavailable` if the address does not give the
    file, and another `InputError` if the file cannot be saved or has another digest."""
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    remedy = f"run it again, or get the file by other means and save it as {path}\nfrom {url}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{path.name}: waiting for another process to download it"
        with _lock(path.with_name(f"{path.name}.lock"), waiting):
            if path.exists():  # downloaded by another process meanwhile
                return path
            _receive_all(url, part)
            if _digest(part, digest) == digest:
                return part.replace(path)
            found = describe(part)
            part.unlink()
    except NETWORK_ERRORS as error:
        reason = one_line(error)
        raise Unavailable(f"{path.name}: cannot be downloaded ({reason}); {remedy}") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be saved or read: {error}; make room, or choose another folder"
        ) from error
    raise InputError(f"{path.name}: the wrong digest: {found} came, and was deleted; {remedy}")


def _lock(file: Path, waiting: str) -> AbstractContextManager:
    """The lock on `file`, as soon as no other process holds it; prints `waiting` if one does. No
    lock where the file system has none. It ends with the process; the empty file may stay."""
    found = FileLock(file)
    try:
        return found.acquire(timeout=0)
    except Timeout:
        print(waiting, file=sys.stderr)
        return found.acquire()
    except (OSError, NotImplementedError):
        return nullcontext()


def _digest(file: Path, like: str) -> str:
    """The digest of a file, of the same kind as `like`."""
    found = hashlib.new("md5" if len(like) == 32 else "sha256", usedforsecurity=False)
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _receive_all(url: str, part: Path) -> None:
    """Bring the part to the length that the server promises, as long as bytes arrive."""
    while True:
        before = _size(part)
        try:
            return _receive(url, part)
        except HTTPError as error:
            if error.code == 416 and before:  # there are no more bytes
                return None
            raise
        except NETWORK_ERRORS:
            if _size(part) <= before:
                raise


def _receive(url: str, part: Path) -> None:
    """Append the missing bytes to the part; start anew if the server cannot continue."""
    offset = _size(part)
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with (
        urlopen(request, timeout=TIMEOUT) as response,
        part.open("ab" if response.status == 206 else "wb") as file,
        progress_bar(desc=part.stem, initial=file.tell(), unit="B", unit_scale=True) as bar,
    ):
        if response.length is not None:
            bar.total = file.tell() + response.length
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
        if bar.total is not None and file.tell() < bar.total:
            raise ConnectionError(f"it broke off at {file.tell():,} of {bar.total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
