"""The image files in a folder."""

import os
from pathlib import Path

from PIL import Image

from models.errors import InputError
from models.preprocess import DRAWN_BY_PROGRAMS, NEED_A_PACKAGE

# Formats of which Pillow knows the name alone.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}


def find_images(folder: Path) -> list[Path]:
    """The image files anywhere below `folder`, as paths relative to it, in the order of their
    names; files and folders that are hidden (".name") are passed over.

    Images are known by the endings of the formats that Pillow reads; photographs that need a
    package are counted. Linked folders are entered, but none twice. Raises `InputError` if there
    are no images.
    """
    Image.init()
    readable = Image.OPEN.keys() - DRAWN_BY_PROGRAMS - NOT_DECODED
    endings = {end for end, kind in Image.registered_extensions().items() if kind in readable}
    found: list[Path] = []
    unread: list[Path] = []
    entered: set[str] = set()
    waiting = [folder]
    while waiting:
        for here, folders, files in os.walk(waiting.pop(), onerror=_warn):
            real = os.path.realpath(here)
            folders[:] = [] if real in entered else [f for f in folders if not f.startswith(".")]
            if real in entered:
                continue
            entered.add(real)
            waiting += [link for name in folders if (link := Path(here, name)).is_symlink()]
            inside = Path(here).relative_to(folder)
            visible = [inside / name for name in files if not name.startswith(".")]
            found += [image for image in visible if image.suffix.lower() in endings]
            unread += [i for i in visible if i.suffix.lower() in NEED_A_PACKAGE.keys() - endings]
    problem = "there are no images in it; put some into it, or name another folder"
    if unread:
        problem = (
            f"{len(unread):,} photographs, such as {min(unread)}, are in a format that needs "
            f"{NEED_A_PACKAGE[min(unread).suffix.lower()]}"
        )
    if not found:
        raise InputError(f"{folder}: {problem}")
    if unread:
        print(f"warning: {folder}: {problem}; they are passed over")
    return sorted(found)


def _warn(error: OSError) -> None:
    print(f"warning: {error.filename}: passed over, cannot be read ({error.strerror})")
