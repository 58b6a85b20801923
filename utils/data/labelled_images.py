"""Images of classes: from class folders, or from a data set of torchvision."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models.errors import InputError, near_names
from models.files import read_lines
from models.preprocess import Preprocess
from models.scripts import from_here
from utils.data.image_cache import decode_once, gather
from utils.data.image_files import find_images
from utils.data.image_reading import ImageReader, read_batches
from utils.data.torchvision_sets import (
    TORCHVISION_SETS,
    class_names,
    labels_of,
    open_torchvision_set,
)

LEADING_NUMBER = re.compile(r"^n?\d+([\W_]+(?=.*[^\W\d_])|(?=[A-Z][a-z]))")  # of a folder's name
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
    for each in the order of the sorted folders (2 before 10), lines `folder<TAB>name` or `folder
    name`, or ImageNet's class index in JSON. Raises `InputError` for data or names that cannot be
    used; `option` is what a script calls the data.
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
    """The folders in a folder, sorted by name, numbers as numbers, without hidden ones; none if
    there is none."""
    if not root.is_dir():
        return []
    found = (file for file in root.iterdir() if file.name[0] != "." and file.is_dir())
    return sorted(found, key=lambda folder: (_natural(folder.name), folder.name))


def _natural(name: str) -> list[str | int]:
    """A key to sort by, with 2 before 10: text and numbers in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _named(keys: list[str], file: Path | None) -> list[str]:
    """The names of the classes that have these folders (or names in torchvision)."""
    if file is None:
        return _words(keys)
    lines = read_lines(file, "class name")
    names = _names_by_key(lines, keys, file)
    if names:
        if missing := [key for key in keys if not names.get(key)]:
            near = near_names(missing[0], names.keys() - keys)
            raise InputError(
                f"{file}: no name for {', '.join(missing[:5])}{near}; write folder<TAB>name"
            )
        return [names[key] for key in keys]
    if len(lines) != len(keys):
        raise InputError(
            f"{file}: {len(lines)} class names, where there are {len(keys)} classes "
            f"({keys[0]} to {keys[-1]}); write one on each line, in this order"
        )
    return lines


def _words(keys: list[str]) -> list[str]:
    """Folders' names as words: `big_cat` as "big cat", `BigCat` as "Big Cat", and `001.cat`, where
    all begin with a number and the rests differ, as "cat"."""
    rests = [LEADING_NUMBER.sub("", key) for key in keys]
    if all(map(str.__ne__, rests, keys)) and len({*rests}) == len(keys):
        keys = rests
    spaced = (re.sub("(?<=[a-z])(?=[A-Z])", " ", key) if key.isalpha() else key for key in keys)
    return [key.replace("_", " ").strip() or key for key in spaced]


def _names_by_key(lines: list[str], keys: list[str], file: Path) -> dict[str, str]:
    """The names in a file that has them by folder: JSON, lines `folder<TAB>name`, or lines
    `folder name`, for most folders at least. Empty for a file of names alone."""
    if file.suffix.lower() == ".json":
        return _names_in_json("\n".join(lines), file)
    if any("\t" in line for line in lines):
        pairs = (line.partition("\t")[::2] for line in lines)
        return {key.strip(): name.strip() for key, name in pairs}
    names = {}
    for line in lines:
        if own := max((key for key in keys if line.startswith(f"{key} ")), key=len, default=""):
            names[own] = line.removeprefix(own).strip()
    return names if len(names) > len(keys) / 2 else {}


def _names_in_json(text: str, file: Path) -> dict[str, str]:
    """Names by folder, `{"cat": "a cat"}`; of ImageNet's index, `{"0": ["n01440764", "tench"]}`, by
    folder and by number."""
    names: dict[str, str] = {}
    try:
        for key, value in json.loads(text).items():
            *folders, name = [value] if isinstance(value, str) else value
            names |= dict.fromkeys([key, *folders], name.replace("_", " "))
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(
            f'{file}: should be {{"folder": "name", ...}}, or as ImageNet\'s class index, '
            '{"0": ["n01440764", "tench"], ...}'
        ) from None
    return names


class LabelledImages(Dataset):
    """Images of classes, prepared as a model takes them: `images[i]` is (uint8 pixels
    `[3, side, side]`, index of the class).

    root, image, classes  those of the source
    labels                index of each image's class, `[n]`
    unreadable            {index: what is wrong} of images that turned out to be broken
    """

    def __init__(self, source: Source, preprocess: Preprocess):
        self.name, self.root, self.image, labels, self.classes, pictures = source
        self.reader = ImageReader(self.image, preprocess.resize_and_crop, pictures)
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
