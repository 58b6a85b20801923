"""Images inside other files, read by random access: `00000.tar/000000012.jpg` is the member of a
tar, `train_imgs.tsv/1000002` the line of a table in base64, `data.arrow/17` a row. A container is
indexed once, by the process that looks for the images; workers get the places with the names."""

import base64
import binascii
import re
import tarfile
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

from models.errors import InputError, one_line
from models.files import file_version

Place = tuple[int, int]  # where an image starts in its container, and its size in bytes


def in_container(path: str | Path) -> tuple[Path, str] | None:
    """The container of an image with this path, and the image's name in it; None for a file."""
    found = INSIDE.fullmatch(str(path))
    if found and (file := Path(found[1])).is_file():
        return file, found[3].replace("\\", "/")
    return None


def cached_by_version(files: int) -> Callable:
    """A decorator that keeps the results for the last `files`, as long as these do not change."""

    def decorate(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        kept = lru_cache(maxsize=files)(lambda file, _: read(file))
        return wraps(read)(lambda file: kept(file, file_version(file)))

    return decorate


@cached_by_version(64)
def index_of(file: Path) -> dict[str, Place]:
    """The places of all images in a container. Raises `InputError` if it cannot be read."""
    try:
        index, _ = CONTAINERS[file.suffix.lower()]
        return index(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None


def read_contained(file: Path, name: str, place: Place | None = None) -> bytes:
    """The image file of this name in a container. Raises `InputError` if it cannot be read."""
    is_known = place is not None and place[0] >= 0
    if not is_known and (place := index_of(file).get(name)) is None:
        raise InputError(f"{file}/{name}: {file.name} has no such image")
    try:
        _, read = CONTAINERS[file.suffix.lower()]
        return read(file, *place)
    except OSError as error:
        raise InputError(f"{file}/{name}: cannot be read ({error.strerror})") from None
    except binascii.Error as error:
        raise InputError(f"{file}/{name}: is no picture in base64 ({error})") from None


def _tar_members(file: Path) -> dict[str, Place]:
    try:
        with tarfile.open(file, "r:") as tar:
            places = {
                m.name.replace("\\", "/").removeprefix("./").lstrip("/"): (m.offset_data, m.size)
                for m in tar if m.isfile()
            }  # fmt: skip
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it does not end as a tar does")
            return places
    except tarfile.TarError as error:
        raise InputError(f"{file}: is no whole tar ({one_line(error)}); get a new copy") from None


def _bytes_at(file: Path, start: int, size: int) -> bytes:
    with file.open("rb") as stream:
        stream.seek(start)
        return stream.read(size)


def _table_rows(file: Path) -> dict[str, Place]:
    """Chinese-CLIP's table of images: a line holds an id, a tab, and the file in base64."""
    places, start = {}, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            name, tab, image = line.partition(b"\t")
            if tab:
                places[name.decode(errors="replace").strip()] = start + len(name) + 1, len(image)
            elif line.strip():
                raise InputError(f"{file}: line {number} is not id<TAB>image in base64")
            start += len(line)
    return places


def _base64_at(file: Path, start: int, size: int) -> bytes:
    text = _bytes_at(file, start, size).strip()
    return base64.b64decode(text.translate(bytes.maketrans(b"-_", b"+/")), validate=True)


def _arrow_rows(file: Path) -> dict[str, Place]:
    return {str(row): (row, 0) for row in range(len(arrow_table(file)))}


def _arrow_image(file: Path, row: int, _: int) -> bytes:
    table = arrow_table(file)
    image = table.column(image_column(table))[row].as_py() or {}
    content, path = image.get("bytes"), image.get("path")
    if not (isinstance(content, bytes) or path):
        raise InputError(f"{file}/{row}: the row holds no image")
    return content or Path(path).read_bytes()


@cached_by_version(256)
def arrow_table(file: Path) -> Any:
    """The table of Arrow that a file of Hugging Face's `datasets` (a stream) or a Parquet file
    holds; the former is mapped into memory. Raises `InputError`, also without `pyarrow`."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: reading it needs pyarrow; pip install pyarrow") from None
    try:
        if file.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(file)
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); get a new copy") from None


def image_column(table: Any) -> str | None:
    """The column of a table whose rows hold image files, as `datasets` writes them."""
    for field in table.schema:
        names = [field.type.field(i).name for i in range(field.type.num_fields)]
        if {"bytes", "path"} <= set(names):
            return field.name
    return None


# How all images of a file are found, {name: place}, and how the image file at a place is read.
CONTAINERS: dict[str, tuple[Callable[[Path], dict[str, Place]], Callable[..., bytes]]] = {
    ".tar": (_tar_members, _bytes_at),
    ".tsv": (_table_rows, _base64_at),
    ".arrow": (_arrow_rows, _arrow_image),
    ".parquet": (_arrow_rows, _arrow_image),
}
INSIDE = re.compile(r"(.+?\.(tar|tsv|arrow|parquet))[\\/](.+)", re.IGNORECASE | re.DOTALL)
