"""Images of classes: from class folders, or from a data set of torchvision."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models.errors import InputError
from models.files import read_lines
from models.preprocess import Preprocess
from models.scripts import from_here
from models.weights.registry import near_names
from utils.data.image_cache import decode_once, gather
from utils.data.image_files import find_images
from utils.data.image_reading import ImageReader, read_batches
from utils.data.torchvision_sets import (
    TORCHVISION_SETS,
    class_names,
    labels_of,
    open_torchvision_set,
)

SCORED = ("val", "valid", "test")  # folders of the images to score on, the first that is there


class Source(NamedTuple):
    """Where the images of classes are; none is read yet.

    name      of the set and its split, also for a file of its cache
    root      the folder that the images lie in
    image     the path of each; in a set of torchvision "<root>/<name>/<number>", for messages
    label     the index of each one's class, from 0
    classes   the names of the classes, as texts
    pictures  the data set of torchvision that reads them; None for image files
    """

    name: str
    root: Path
    image: list[str]
    label: list[int]
    classes: list[str]
    pictures: Dataset | None = None


def find_labelled_images(
    data: str | os.PathLike,
    is_train: bool = False,
    data_root: Path | None = None,
    names_file: Path | None = None,
    option: str = "--data",
) -> Source:
    """The images to score on, or those to train on, of the folder or torchvision's set `data`.

    A folder holds `train/` and `val/` (or `valid/` or `test/`), each with a folder of images for
    each class, or the class folders themselves, whose images are all to score on. A set is read
    from `data_root`, by default `torchvision_data` beside the scripts, and downloaded there if need
    be. The classes have the names of their folders, or of the set, or those in `names_file`: a line
    for each in the order of the sorted folders, or lines `folder<TAB>name`. Raises `InputError` for
    data or names that cannot be used; `option` is what a script calls the data.
    """
    root = Path(data).expanduser()
    if root.is_dir():
        source = _class_folders(root, is_train)
    elif data in TORCHVISION_SETS:
        root = data_root or from_here("torchvision_data")
        pictures = open_torchvision_set(data, root, is_train)
        name = f"{data}_{'train' if is_train else 'test'}"
        labels = labels_of(pictures)
        image = [str(root / name / str(number)) for number in range(len(labels))]
        source = Source(name, root, image, labels, class_names(data, pictures), pictures)
    else:
        raise InputError(
            f"{option} {data}: {'is no folder' if root.exists() else 'no such folder'}, and no "
            f"data set of torchvision{near_names(str(data), TORCHVISION_SETS)}; the sets are "
            f"{', '.join(TORCHVISION_SETS)}"
        )
    return source._replace(classes=_named(source.classes, names_file))


def _class_folders(root: Path, is_train: bool) -> Source:
    scored = next((root / name for name in SCORED if _folders(root / name)), None)
    if is_train:
        _check_both_splits(root / "train", scored or root / SCORED[0])
    split = root / "train" if is_train else scored or root
    folders = _folders(split)
    if len(folders) < 2:
        found = f"only one class folder in it, {folders[0].name}" if folders else "no class folders"
        raise InputError(
            f"{split}: {found}; give a folder with a folder of images for each class, or with "
            "train/ and val/ that have such folders in them"
        )
    image, label = [], []
    for number, folder in enumerate(folders):
        own = [str(folder / file) for file in find_images(folder)]
        image += own
        label += [number] * len(own)
    name = root.resolve().name + ("" if split is root else f"_{split.name}")
    return Source(name, root, image, label, [folder.name for folder in folders])


def _check_both_splits(train: Path, scored: Path) -> None:
    """Raise `InputError` unless both are there, with the same classes."""
    names = [{folder.name for folder in _folders(split)} for split in (train, scored)]
    if not all(names):
        raise InputError(
            f"{train.parent}: --linear_probe needs class folders to train on in {train} and others "
            f"to score on in {scored}; there are not both"
        )
    if alone := names[0] ^ names[1]:
        raise InputError(
            f"{train.parent}: the class folder {min(alone)} is in only one of {train.name}/ and "
            f"{scored.name}/; give both the same classes"
        )


def _folders(root: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden ones; none if there is none."""
    if not root.is_dir():
        return []
    found = (file for file in root.iterdir() if file.name[0] != "." and file.is_dir())
    return sorted(found, key=lambda folder: folder.name)


def _named(keys: list[str], names_file: Path | None) -> list[str]:
    """The names of the classes that have these folders (or names in torchvision)."""
    if names_file is None:
        return [key.replace("_", " ").strip() or key for key in keys]
    lines = read_lines(names_file, "class name")
    if any("\t" in line for line in lines):
        pairs = [line.partition("\t")[::2] for line in lines]
        names = {key.strip(): name.strip() for key, name in pairs}
        for key, name in names.items():
            if key not in keys or not name:
                what = "no name" if key in keys else f"no such class{near_names(key, keys)}"
                raise InputError(f"{names_file}: {key!r:.80}: {what}; write folder<TAB>name")
        missing = [key for key in keys if key not in names]
        if missing:
            raise InputError(f"{names_file}: no line folder<TAB>name for {', '.join(missing[:5])}")
        return [names[key] for key in keys]
    if len(lines) != len(keys):
        raise InputError(
            f"{names_file}: {len(lines)} class names, where there are {len(keys)} classes "
            f"({keys[0]} to {keys[-1]}); write one on each line, in this order"
        )
    return lines


class LabelledImages(Dataset):
    """Images of classes, prepared as a model takes them: `images[i]` is (uint8 pixels
    `[3, side, side]`, index of the class).

    root, image, classes  those of the source
    labels                index of each image's class, `[n]`
    unreadable            {index: what is wrong} of images that turned out to be broken
    """

    def __init__(self, source: Source, preprocess: Preprocess):
        self.name, self.root, self.image, labels, self.classes, pictures = source
        self.reader = ImageReader(self.image, preprocess.pixels, pictures)
        self.labels = torch.tensor(labels)
        self.preprocess = preprocess
        self.cached: Tensor | None = None
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.reader[index], int(self.labels[index])

    def batches(self, batches: list[list[int]], num_workers: int) -> Iterator[Tensor]:
        """Batches of images, `[n, 3, side, side]`, for lists of image indices. One that cannot be
        read is named once and put into `unreadable`, and another takes its place."""
        if self.cached is not None:
            yield from gather(self.cached, batches)
            return
        for loaded in read_batches(self.reader, batches, num_workers, substitute=True):
            self._pass_over(loaded.problems)
            yield loaded.images

    def cache(
        self,
        folder: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        """Decode all images now, for many passes over them; the arguments are those of
        `decode_once`."""
        self.cached, problems = decode_once(self, self.name, folder, device, num_workers)
        self._pass_over(problems)

    def _pass_over(self, problems: dict[int, str]) -> None:
        for row in problems.keys() - self.unreadable.keys():
            tqdm.write(f"{problems[row]}; it is passed over")
        self.unreadable |= problems
