"""Downloads that end in a verified file, or in a message that says why not.

Beside the file `NAME` there may lie `NAME.part`, what has arrived so far, which takes its final
name once its digest is right; and `NAME.lock`, held by the process that writes the part.
"""

import hashlib
import os
import ssl
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from models.errors import InputError, one_line
from models.files import describe, lock
from models.progress_bar import progress_bar

CHUNK = 1 << 16  # bytes
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 4  # in a row that bring no new bytes
WAIT = 2  # seconds between two of them
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP statuses worth another attempt


class Unavailable(InputError):
    """The address does not give the file: nothing answers there, or the answer is a refusal."""


def download(url: str, path: str | os.PathLike, digest: str) -> Path:
    """The file at `path`, downloaded from `url` unless it is there: a download gets its final name
    once its digest is right, and is not read through again.

    `digest`: 32 hexadecimal digits are an MD5, 64 a SHA-256. Raises `Unavailable` if the address
    does not give the file, and another `InputError` if it cannot be saved, or is another one.
    """
    path = Path(path)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path):
                if not path.exists():  # another process may have brought it meanwhile
                    return _fetch(url, path, digest)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be saved or read: {error}; make room, or choose another folder "
            "(an unfinished download is kept, and the next run continues it)"
        ) from error
    return path


def _fetch(url: str, path: Path, digest: str) -> Path:
    """Download to the part, check it, and give it its final name."""
    part = path.with_name(f"{path.name}.part")
    continued = part.exists()
    _receive_all(url, path, part)
    if _hash(part, digest) == digest:
        return part.replace(path)
    received = describe(part)
    part.unlink()
    if continued:  # what an earlier run left may be at fault
        return _fetch(url, path, digest)
    reason = f"the wrong digest: {received} came, and was deleted"
    raise InputError(_advice(url, path, reason, "try again later"))


def _receive_all(url: str, path: Path, part: Path) -> None:
    """Bring the part to the length that the server promises, in several attempts if need be."""
    most, failures, is_connected = _size(part), 0, False
    while True:
        try:
            return _receive(url, path, part)
        except HTTPError as error:
            error.close()
            reason = one_line(error)  # the server's words
            if error.code == 416 and _size(part):
                return None  # it has nothing beyond
            if error.code not in PASSING:
                raise Unavailable(_advice(url, path, reason, "look whether it moved")) from error
        except URLError as error:
            reason = one_line(error.reason)
            if not (is_connected or isinstance(error.reason, TimeoutError)):
                failures = ATTEMPTS  # this machine is most likely offline
        except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = one_line(error)
        is_connected = is_connected or failures < ATTEMPTS
        failures = failures + 1 if _size(part) <= most else 1
        most = max(most, _size(part))
        if failures >= ATTEMPTS:
            raise Unavailable(_advice(url, path, reason, "try again later"))
        print(f"{path.name}: {reason}; another attempt in {WAIT} s", file=sys.stderr)
        time.sleep(WAIT)


def _receive(url: str, path: Path, part: Path) -> None:
    """Append to the part what it lacks; start it over where the server cannot continue it."""
    offset = _size(part)
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with (
        urlopen(request, timeout=TIMEOUT) as response,
        part.open("ab" if response.status == 206 else "wb") as file,
        progress_bar(desc=path.name, initial=file.tell(), unit="B", unit_scale=True) as bar,
    ):
        if response.length is not None:
            bar.total = file.tell() + response.length
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
        arrived = file.tell()
        if bar.total is not None and arrived < bar.total:
            raise ConnectionError(f"the connection broke off at {arrived:,} of {bar.total:,} bytes")
        file.flush()
        os.fsync(file.fileno())


def _lock(path: Path) -> AbstractContextManager:
    """The lock on the download to `path`, once no other process holds it."""
    waiting = f"{path.name}: waiting for another process to download it"
    try:
        return lock(path.with_name(f"{path.name}.lock"), waiting)
    except (OSError, NotImplementedError):
        # A file system without locks: two processes at once end in a wrong digest. A folder that
        # cannot be written to shows when the part is.
        return nullcontext()


def _hash(path: Path, like: str) -> str:
    """The file's digest, by the algorithm that the digest `like` is of."""
    with path.open("rb") as file:
        digest = hashlib.new("md5" if len(like) == 32 else "sha256", usedforsecurity=False)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _advice(url: str, path: Path, reason: str, remedy: str) -> str:
    return (
        f"{path.name}: cannot be downloaded ({reason}); {remedy}, or get the file by other means "
        f"and save it as {path}\nfrom {url}"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
