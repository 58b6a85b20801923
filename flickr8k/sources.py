"""The files in the sources of prepare.py: folders, zips and single files."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

from models.errors import InputError
from models.files import decoded


class SourceFile(NamedTuple):
    """A file of a source: the file at `path`, or a member of the zip at `path`."""

    path: Path
    size: int  # bytes, unpacked
    archive: ZipFile | None = None
    member: ZipInfo | None = None
    name: str = ""  # its path in its source or its zip, with slashes

    def __str__(self) -> str:
        return f"{self.path}/{self.member.filename}" if self.archive else str(self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its path; of a member, in its zip."""
        return PureWindowsPath(self.member.filename).parts if self.archive else self.path.parts

    def below(self, folder: Path) -> str | None:
        """Its path relative to `folder`; None in a zip or elsewhere."""
        path, folder = absolute(self.path), absolute(folder)
        is_below = not self.archive and path.is_relative_to(folder)
        return path.relative_to(folder).as_posix() if is_below else None

    def read_bytes(self) -> bytes:
        """The content. Raises `InputError` for an unreadable file."""
        with _readable(self):
            return self.archive.read(self.member) if self.archive else self.path.read_bytes()

    def read_text(self) -> str:
        """The content as text. Raises `InputError`, also if it is not UTF-8."""
        return decoded(self.read_bytes(), self)


class FileIndex:
    """Files by the ends of their paths, without regard to upper and lower case."""

    def __init__(self, files: Iterable[SourceFile], root: Path):
        self.root = root
        self.with_end: dict[tuple[str, ...], list[SourceFile]] = {}  # of one part, of two
        self.add(files)

    def add(self, files: Iterable[SourceFile]) -> None:
        for file in files:
            for end in {_folded(file.parts[-1:]), _folded(file.parts[-2:])}:
                self.with_end.setdefault(end, []).append(file)

    def find(self, parts: tuple[str, ...]) -> list[SourceFile]:
        """The files whose paths share the longest end with `parts`; among them, in this order,
        those spelled the same, below `root`, in no zip."""
        folded = _folded(parts)
        found = self.with_end.get(folded[-2:]) or self.with_end.get(folded[-1:], [])
        for n in range(3, len(parts) + 1):
            found = [f for f in found if _folded(f.parts[-n:]) == folded[-n:]] or found

        def rank(file: SourceFile) -> tuple[bool, bool, bool]:
            is_below = file.below(self.root) is not None
            return file.parts[-1] == parts[-1], is_below, not file.archive

        best = max(map(rank, found), default=None)
        return [file for file in found if rank(file) == best]

    def named(self, name: str) -> SourceFile | None:
        """The first file of that name, whatever its folder, or None."""
        return next(iter(self.find((name.rpartition("/")[2],))), None)


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.casefold() for part in parts)


def absolute(path: Path) -> Path:
    """Without following links: an image that a link in the data folder leads to is in it."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def find_files(sources: Iterable[Path], open_zips: ExitStack) -> list[SourceFile]:
    """All files in `sources`, each once, without hidden ones, which macOS and killed runs leave.
    Raises `InputError` for a missing or unreadable source."""
    files: list[SourceFile] = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: there is no such file or folder (--source)")
        folder = source if source.is_dir() else source.parent
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            name = path.relative_to(folder)
            if any(part.startswith(".") for part in name.parts) or not path.is_file():
                continue
            if path.suffix.lower() == ".zip":
                files += zip_members(path, open_zips)
            else:
                files.append(SourceFile(path, path.stat().st_size, name=name.as_posix()))
    return list({(absolute(f.path), f.archive and f.parts): f for f in files}.values())


def zip_members(path: Path, open_zips: ExitStack) -> list[SourceFile]:
    """The files in a zip, which stays open until `open_zips` is closed."""
    with _readable(path):
        archive = open_zips.enter_context(ZipFile(path))
    names = [(m, PureWindowsPath(m.filename).as_posix()) for m in archive.infolist()]
    members = [SourceFile(path, m.file_size, archive, m, name) for m, name in names]
    return [m for m in members if not (m.member.is_dir() or m.parts[-1].startswith("."))]


@contextmanager
def _readable(file: SourceFile | Path) -> Iterator[None]:
    """Turn errors of reading `file` into an `InputError` that names it."""
    try:
        yield
    except (OSError, BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); get a new copy of it, or move it out of the source"
        ) from error
