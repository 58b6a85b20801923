"""Image files: finding them in a folder, and checking those of data sets before training."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from models.errors import InputError, listed
from models.preprocess import DRAWN_BY_PROGRAMS, NEED_A_PACKAGE
from models.progress_bar import progress_bar
from utils.data.caption_formats import SPLITS
from utils.data.containers import Place, in_container, index_of
from utils.data.image_batches import read_image

NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow names but cannot read
AT_A_TIME = 1024  # images that wait for a thread


def find_images(folder: Path) -> list[Path]:
    """The image files below `folder`, by the endings of Pillow's formats: sorted paths relative to
    it, without hidden ones (".name"). Links are followed, but no folder is entered twice. A warning
    counts photographs that need a package. Raises `InputError` without images."""
    Image.init()
    readable = Image.OPEN.keys() - DRAWN_BY_PROGRAMS - NOT_DECODED
    endings = {end for end, kind in Image.registered_extensions().items() if kind in readable}
    found: list[Path] = []
    unread: list[Path] = []
    entered: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=_warn, followlinks=True):
        real = os.path.realpath(here)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (Path(here, name).is_symlink(), name))
        inside = Path(here).relative_to(folder)
        visible = [inside / name for name in files if not name.startswith(".")]
        found += [image for image in visible if image.suffix.lower() in endings]
        unread += [i for i in visible if i.suffix.lower() in NEED_A_PACKAGE.keys() - endings]
    problem = "there are no images in it; put some into it, or name another folder"
    if unread:
        package = NEED_A_PACKAGE[min(unread).suffix.lower()]
        problem = f"{len(unread):,} photographs, such as {min(unread)}, need {package}"
    if not found:
        raise InputError(f"{folder}: {problem}")
    if unread:
        print(f"warning: {folder}: {problem}; they are passed over")
    return sorted(found)


def _warn(error: OSError) -> None:
    print(f"warning: {error.filename}: passed over, cannot be read ({error.strerror})")


def locate(root: Path, names: Sequence[str]) -> tuple[list[str], np.ndarray | None]:
    """Those of `names`, paths below `root`, that are not there; and the places of images that lie
    in containers, `[n, 2]`, or None if none does. Each folder is listed once, since a question
    about each file takes long in the network. Raises `InputError` for a broken container."""
    containers: dict[str, tuple[dict[str, Place], str] | None] = {}
    in_folder: dict[str, set[str]] = {}
    places, missing = None, set()
    for row, name in enumerate(names):
        folder, _, file = name.rpartition("/")
        if folder not in containers:
            found = in_container(root / folder / "_")
            containers[folder] = found and (index_of(found[0]), found[1][:-1])
        if containers[folder] is None:
            in_folder.setdefault(folder, set()).add(file)
            continue
        index, inner = containers[folder]
        place = index.get(f"{inner}{file}")
        if place is None:
            missing.add(name)
        else:
            places = np.full((len(names), 2), -1) if places is None else places
            places[row] = place
    for folder, wanted in in_folder.items():
        with suppress(OSError), os.scandir(root / folder) as files:
            wanted.difference_update(file.name for file in files if file.is_file())
        # A file system can take other spellings than those it lists.
        left = (f"{folder}/{file}" if folder else file for file in wanted)
        missing.update(name for name in left if not os.path.isfile(root / name))  # noqa: PTH113
    return [name for name in names if name in missing] if missing else [], places


def check_splits(sets: dict[str, Dataset], num_workers: int, train_too: bool = False) -> None:
    """Warn of training images that are in other splits. Raise `InputError` with a list of the
    unreadable images of the other splits and, with `train_too`, of training."""
    held_out = {split: dataset for split, dataset in sets.items() if split != "train"}
    for split, dataset in held_out.items():
        scored = set(dataset.image)
        if shared := [image for image in sets["train"].image if image in scored]:
            print(
                f"warning: {len(shared):,} images are in both training and {SPLITS[split]}, "
                f"{listed(shared)}: scores on them are too good; list each image once"
            )
    refuse_unreadable([*([sets["train"]] if train_too else []), *held_out.values()], num_workers)


def refuse_unreadable(sets: list[Dataset], num_workers: int) -> None:
    """Raise `InputError` with a list of unreadable images; warn of pictures of one colour."""
    not_cached = chain.from_iterable(dataset.image for dataset in sets if dataset.cached is None)
    found, plain = check_images(list(dict.fromkeys(not_cached)), num_workers)
    known = chain.from_iterable(dataset.unreadable.values() for dataset in sets)
    if plain:
        print(f"warning: {len(plain):,} pictures are read as of one colour, {listed(plain)}")
    if broken := dict.fromkeys(chain(known, found)):
        raise InputError("\n  ".join([f"{len(broken)} images cannot be read:", *broken]))


def check_images(images: list[str], num_workers: int = 0) -> tuple[list[str], list[str]]:
    """The problem of each unreadable image, and the paths of those of one colour."""
    problems, plain = [], []
    size = len(images)
    with (
        ThreadPoolExecutor(max(1, num_workers)) as threads,
        progress_bar(total=size, desc="checking images", unit="img", disable=not size) as bar,
    ):
        for start in range(0, size, AT_A_TIME):
            paths = images[start : start + AT_A_TIME]
            for path, read in zip(paths, threads.map(_read, paths), strict=True):
                bar.update()
                if isinstance(read, str):
                    problems.append(read)
                elif read:
                    plain.append(path)
    return problems, plain


def _read(path: str) -> str | bool:
    """The problem of the image at `path`, or else whether it is of one colour."""
    try:
        return read_image(path).getcolors(1) is not None
    except InputError as error:
        return str(error)
