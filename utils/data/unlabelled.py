"""Images without captions and sentences without images, to distil on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import InputError
from models.files import read_lines
from utils.data.image_files import find_images


@dataclass
class Unlabelled:
    """Paths of images, and sentences."""

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def find_unlabelled(paths: Sequence[str]) -> Unlabelled:
    """The images below folders and the lines of text files. `InputError` for a path without any."""
    found = Unlabelled()
    for path in map(Path, paths):
        try:
            if path.is_dir():
                found.images += [str(path / image) for image in find_images(path)]
            else:
                found.texts += read_lines(path, "sentence")
        except InputError as error:
            raise InputError(f"--distill_data: {error}") from None
    return found
