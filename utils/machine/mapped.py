"""Objects with large arrays in a file, from which several processes map them into memory once."""

import mmap
import pickle
from pathlib import Path
from typing import Any

from models.errors import InputError

ALIGNMENT = 64  # bytes


def write_arrays(value: object, file: Path) -> None:
    """Write any picklable `value`, with its arrays after the rest, to a temporary file. Raises
    `InputError` where there is no room."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    try:
        with file.open("wb") as stream:
            pickle.dump((content, [len(buffer.raw()) for buffer in buffers]), stream)
            for buffer in buffers:
                stream.write(bytes(-stream.tell() % ALIGNMENT))
                stream.write(buffer.raw())
    except OSError as error:
        raise InputError(
            f"{file.parent}: cannot be written ({error.strerror}); make room, or set TMPDIR to "
            "another folder"
        ) from None


def map_arrays(file: Path) -> Any:
    """What `write_arrays` has written. A change of an array is this process's own."""
    with Path(file).open("rb") as stream:
        content, sizes = pickle.load(stream)
        start = stream.tell()
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    buffers = []
    for size in sizes:
        start += -start % ALIGNMENT
        buffers.append(mapped[start : start + size])
        start += size
    return pickle.loads(content, buffers=buffers)
