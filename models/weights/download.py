"""Downloads that end in a verified file, or in a message with the reason.

`NAME.part` beside the file `NAME` holds the bytes so far; the process that writes it holds the lock
`NAME.lock`.
"""

import hashlib
import ssl
import sys
import time
from contextlib import nullcontext
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
    """The address does not give the file: no server answers, or the server refuses."""


def download(url: str, path: Path, digest: str) -> Path:
    """The file at `path`, downloaded from `url` unless it exists.

    `digest` is an MD5 (32 hexadecimal digits) or a SHA-256 (64); a download gets its final name
    once its digest is right. Raises `Unavailable` if the address does not give the file, and
    another `InputError` if the file cannot be saved or has another digest.
    """
    path = Path(path)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            waiting = f"{path.name}: waiting for another process to download it"
            held = lock(path.with_name(f"{path.name}.lock"), waiting)
        except (OSError, NotImplementedError):  # a file system without locks
            held = nullcontext()
        with held:
            if not path.exists():  # another process may have downloaded it meanwhile
                _fetch(url, path, digest)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be saved or read: {error}; make room, or choose another folder "
            "(an unfinished download is kept, and the next run continues it)"
        ) from error
    return path


def _fetch(url: str, path: Path, digest: str) -> None:
    """Download to the part, check its digest, and give it its final name."""
    part = path.with_name(f"{path.name}.part")
    is_continued = part.exists()
    _receive_all(url, path, part)
    found = hashlib.new("md5" if len(digest) == 32 else "sha256", usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() == digest:
        part.replace(path)
        return None
    reason = f"the wrong digest: {describe(part)} came, and was deleted"
    part.unlink()
    if is_continued:  # the part of an earlier run may be at fault
        return _fetch(url, path, digest)
    raise InputError(_advice(url, path, reason))


def _receive_all(url: str, path: Path, part: Path) -> None:
    """Bring the part to the length that the server promises, in several attempts if need be."""
    most, failures = _size(part), 0
    while True:
        try:
            return _receive(url, path, part)
        except HTTPError as error:
            error.close()
            if error.code == 416 and _size(part):
                return None  # there are no more bytes
            reason, may_pass = error, error.code in PASSING
        except URLError as error:  # not of a server, so that this machine is most likely offline
            reason, may_pass = error.reason, isinstance(error.reason, TimeoutError)
        except (HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason, may_pass = error, True
        failures = 1 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        if failures >= ATTEMPTS or not may_pass:
            raise Unavailable(_advice(url, path, one_line(reason)))
        print(f"{path.name}: {one_line(reason)}; another attempt in {WAIT} s", file=sys.stderr)
        time.sleep(WAIT)


def _receive(url: str, path: Path, part: Path) -> None:
    """Append the missing bytes to the part; start anew if the server cannot continue."""
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
        if bar.total is not None and file.tell() < bar.total:
            raise ConnectionError(
                f"the connection broke off at {file.tell():,} of {bar.total:,} bytes"
            )


def _advice(url: str, path: Path, reason: str) -> str:
    return (
        f"{path.name}: cannot be downloaded ({reason}); try again later, or get the file by other "
        f"means and save it as {path}\nfrom {url}"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
