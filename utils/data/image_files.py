"""The image files in a folder."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from models.errors import InputError
from models.preprocess import DRAWN_BY_PROGRAMS, NEED_A_PACKAGE, is_one_colour, open_image
from models.progress_bar import progress_bar
from utils.data.annotations import shared_images_warning

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


SHOWN = 3  # pictures of one colour


def check_splits(sets: dict[str, Dataset], num_workers: int, train_too: bool = False) -> None:
    """Warn of training images that are in other splits as well, and read the images of the others;
    with `train_too`, also those to train on. `sets` are data sets by split. Raises `InputError`
    with a list of those that cannot be read."""
    train = sets["train"]
    held_out = {split: dataset for split, dataset in sets.items() if split != "train"}
    for split, dataset in held_out.items():
        if warning := shared_images_warning(train.image, dataset.image, split):
            print(f"warning: {warning}")
    checked = [*([train] if train_too else []), *held_out.values()]
    refuse_unreadable(checked, num_workers)


def refuse_unreadable(sets: list[Dataset], num_workers: int) -> None:
    """Raise `InputError` with a list of the images of `sets` that cannot be read; each is decoded,
    but where the set's pixels are `cached`, and its `unreadable` tells what is wrong. Warn of
    pictures that are one colour, all in one line."""
    unread = chain.from_iterable(dataset.image for dataset in sets if dataset.cached is None)
    problems = chain.from_iterable(dataset.unreadable.values() for dataset in sets)
    found, plain = check_images(list(dict.fromkeys(unread)), num_workers)
    cached = chain.from_iterable(_plain_in_cache(dataset) for dataset in sets)
    if plain := list(dict.fromkeys(chain(plain, cached))):
        shown = ", ".join(plain[:SHOWN]) + (", ..." if len(plain) > SHOWN else "")
        print(f"warning: pictures of one colour, as they are read: {len(plain):,} ({shown})")
    broken = dict.fromkeys(chain(problems, found))
    if broken:
        raise InputError("\n  ".join([f"{len(broken)} images cannot be read:", *broken]))


def check_images(images: list[str], num_workers: int = 0) -> tuple[list[str], list[str]]:
    """Decode the image files at these paths, `num_workers` at a time, in threads. Returns "path:
    reason" for each that cannot be read, and the paths of those that are one colour; both in their
    order."""
    problems, plain = [], []
    with (
        ThreadPoolExecutor(max(1, num_workers)) as threads,
        progress_bar(
            total=len(images), desc="checking images", unit="img", disable=not images
        ) as bar,
    ):
        for path, read in zip(images, threads.map(_read, images), strict=True):
            bar.update()
            if isinstance(read, str):
                problems.append(read)
            elif read:
                plain.append(path)
    return problems, plain


def _read(path: str) -> str | bool:
    """What is wrong with the image at `path`, or else whether it is one colour."""
    try:
        return is_one_colour(open_image(path))
    except InputError as error:
        return str(error)


def _plain_in_cache(dataset: Dataset) -> list[str]:
    """The images of a set that are one colour among its cached pixels, `[n, 3, side, side]`. Most
    show in their first row that they are not."""
    if dataset.cached is None:
        return []
    rows = dataset.cached[:, :, 0]
    candidates = (rows == rows[..., :1]).flatten(1).all(1).nonzero().flatten().tolist()
    pixels = ((row, dataset.cached[row].flatten(1)) for row in candidates)
    return [dataset.image[row] for row, colours in pixels if (colours == colours[:, :1]).all()]
