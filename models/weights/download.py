"""Downloads that end in a verified file, or in one line that says why not.

Beside the file `NAME` there may lie:

- `NAME.part`: what has arrived so far. It takes its final name once its digest is right.
- `NAME.sha256` (or `.md5`): a record that the digest was right, for a file of that size and time.
  While those stay the same, the file is not read through again: this notices a file that was
  replaced or edited, not a disk that decays. `sha256sum -c` reads the record too.
- `NAME.lock`: locked by the process that writes the part, so that no other does (`models.locks`).
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from models.errors import InputError
from models.locks import lock
from models.progress_bar import progress_bar
from models.weights.file_kind import describe, one_line

WEB = ("http://", "https://")
ALGORITHMS = {32: "md5", 64: "sha256"}  # by the number of hexadecimal digits
CHUNK = 1 << 16  # bytes
TIMEOUT = 30  # seconds without a byte
BACK_OFF = (1, 2, 4)  # seconds before each further attempt; from the first again after new bytes
PASSING = {408, 429, 500, 502, 503, 504}  # HTTP statuses worth another attempt


class Unavailable(InputError):
    """The address does not give the file: nothing answers there, or the answer is a refusal."""


class _Interrupted(Exception):
    """The download stopped for a reason that may pass."""


class _WebOnly(HTTPRedirectHandler):
    """Follows redirects within the web: a server has no say over this machine's files."""

    def redirect_request(self, request, file, code, message, headers, new_url):
        if not new_url.lower().startswith(WEB):
            raise HTTPError(new_url, code, "a redirect that leaves the web", headers, file)
        return super().redirect_request(request, file, code, message, headers, new_url)


def download(url: str, path: str | os.PathLike, digest: str) -> Path:
    """The file at `path`, downloaded from `url` unless it is there, never with a wrong digest.

    `digest`: 32 hexadecimal digits are an MD5, 64 a SHA-256. A file put there by hand is checked
    too. Raises `Unavailable` if the address does not give the file, and another `InputError` if it
    cannot be saved, or is another one.
    """
    if not url.startswith(WEB):
        raise InputError(f"{url}: not an http or https address")
    path = Path(path)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _lock(path):
                if not path.exists():  # another process may have brought it meanwhile
                    _fetch(url, path, digest)
        _verify(url, path, digest)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be saved or read: {error}; make room, or choose another folder "
            "(an unfinished download is kept, and the next run continues it)"
        ) from error
    return path


def _verify(url: str, path: Path, digest: str) -> None:
    """Raise unless `path` has the digest, or its record says that it had."""
    record, verified = _record(path, digest)  # from before the reading: a later change must show
    if record.exists() and record.read_text("utf-8", "replace") == verified:
        return
    if _hash(path, digest) != digest:
        raise InputError(
            f"{path}: not the file of {url}, but {describe(path)}; "
            "delete it, and the next run downloads it anew"
        )
    with suppress(OSError):  # a read-only folder: checked again next time
        record.write_text(verified, "utf-8")


def _fetch(url: str, path: Path, digest: str) -> None:
    """Download to the part, check it, and give it its final name."""
    part = _beside(path, "part")
    continued = part.exists()
    _receive_all(url, path, part)
    if _hash(part, digest) != digest:
        received = describe(part)
        part.unlink()
        if continued:  # what an earlier run left may be at fault
            _fetch(url, path, digest)
            return
        raise InputError(
            f"{url}: the wrong digest: {received} came, and was deleted; "
            f"try again later, or {_by_hand(path)}"
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _receive_all(url: str, path: Path, part: Path) -> None:
    """Bring the part to the length that the server promises, in several attempts if need be."""
    most, waits = _size(part), iter(BACK_OFF)
    while True:
        try:
            return _receive(url, path, part)
        except _Interrupted as interrupted:
            reason = interrupted
        if _size(part) > most:
            most, waits = _size(part), iter(BACK_OFF)
        wait = next(waits, None)
        if wait is None:
            raise Unavailable(f"{url}: {reason}; try again later, or {_by_hand(path)}")
        print(f"{path.name}: {reason}; another attempt in {wait} s", file=sys.stderr)
        time.sleep(wait)


def _receive(url: str, path: Path, part: Path) -> None:
    """Append to the part what it lacks; start it over where the server cannot continue it."""
    response = _open(url, path, offset=_size(part))
    if response is None:
        return
    continued = response.status == 206
    with (
        response,
        part.open("ab" if continued else "wb") as file,
        progress_bar(desc=path.name, initial=file.tell(), unit="B", unit_scale=True) as bar,
    ):
        if response.length is not None:
            bar.total = file.tell() + response.length
        for chunk in _chunks(response):
            file.write(chunk)
            bar.update(len(chunk))
        arrived = file.tell()
    if bar.total is not None and arrived < bar.total:
        raise _Interrupted(f"the connection broke off at {arrived:,} of {bar.total:,} bytes")


def _open(url: str, path: Path, offset: int) -> HTTPResponse | None:
    """The server's answer from byte `offset` on; None if it has nothing beyond."""
    request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        return build_opener(_WebOnly).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            return None
        if error.code in PASSING:
            raise _Interrupted(one_line(error)) from error
        reason = one_line(error)  # the server's words
        where = f" (at {error.url})" if error.url != url else ""
        raise Unavailable(
            f"{url}: {reason}{where}; look whether it has moved, or {_by_hand(path)}"
        ) from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The bytes of an answer, so that an error of the network is not taken for one of the disk."""
    try:
        while chunk := response.read(CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _lock(path: Path) -> AbstractContextManager:
    """The lock on the download to `path`, once no other process holds it."""
    waiting = f"{path.name}: waiting for another process to download it"
    try:
        return lock(_beside(path, "lock"), waiting)
    except (OSError, NotImplementedError):
        # A file system without locks: two processes at once end in a wrong digest. A folder that
        # cannot be written to shows when the part is.
        return nullcontext()


def _hash(path: Path, like: str) -> str:
    """The file's digest, by the algorithm that the digest `like` is of."""
    digest = hashlib.new(ALGORITHMS[len(like)], usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _record(path: Path, digest: str) -> tuple[Path, str]:
    """Where a file's record is, and what it reads if the file, as it is now, has the digest."""
    status = path.stat()
    text = f"# {status.st_size} bytes, mtime {status.st_mtime_ns} ns\n{digest}  {path.name}\n"
    return _beside(path, ALGORITHMS[len(digest)]), text


def _by_hand(path: Path) -> str:
    return f"get the file by other means and save it as {path}"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    return one_line(error.reason if isinstance(error, URLError) else error)
