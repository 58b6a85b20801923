"""Labelled images: from class folders, or from a data set of torchvision."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models.errors import InputError, listed, near_names
from models.files import read_lines
from models.preprocess import Preprocess
from models.scripts import from_here
from utils.data.class_folders import class_folders, words_of
from utils.data.image_batches import ImageReader, read_batches
from utils.data.image_cache import decode_once, gather
from utils.data.image_files import find_images
from utils.data.torchvision_sets import (
    TORCHVISION_SETS,
    class_names,
    labels_of,
    open_torchvision_set,
)

SCORED = ("val", "valid", "test")  # folders of images to score on: the first that exists


@dataclass(eq=False, repr=False)
class LabelledImages(Dataset):
    """Labelled images: `images[i]` is (uint8 pixels `[3, side, side]`, index of the class)."""

    name: str  # of the set and its split, also for its cache file
    root: Path  # folder of the images
    image: list[str]  # paths; in a set of torchvision "<root>/<name>/<number>", for messages
    label: list[int]  # index of each image's class, from 0
    classes: list[str]  # their names, as texts
    pictures: Dataset | None = None  # the set of torchvision that reads images; None for files
    preprocess: Preprocess | None = None  # the model's; to be set before images are read
    cached: Tensor | None = None
    unreadable: dict[int, str] = field(default_factory=dict)  # {index: problem} so far

    @property
    def reader(self) -> ImageReader:
        return ImageReader(self.image, self.preprocess.resize_and_crop, pictures=self.pictures)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.reader[index], self.label[index]

    def batches(self, batches: list[list[int]], num_workers: int) -> Iterator[Tensor]:
        """Batches of images, `[n, 3, side, side]`, for lists of image indices. Another image takes
        the place of an unreadable one, which is reported once."""
        if self.cached is not None:
            yield from gather(self.cached, batches)
            return
        for loaded in read_batches(self.reader, batches, num_workers, substitute=True):
            self._pass_over(loaded.problems)
            yield loaded.images

    def cache(self, folder: str | os.PathLike | None = None, num_workers: int = 0) -> None:
        """Decode all images once; the arguments are those of `decode_once`."""
        self.cached, problems = decode_once(self, self.name, folder, num_workers=num_workers)
        self._pass_over(problems)

    def _pass_over(self, problems: dict[int, str]) -> None:
        for row in problems.keys() - self.unreadable.keys():
            tqdm.write(f"{problems[row]}; it is passed over")
        self.unreadable |= problems


def find_labelled_images(
    data: str | os.PathLike,
    is_train: bool = False,
    data_root: Path | None = None,
    names_file: Path | None = None,
    option: str = "--data",
) -> LabelledImages:
    """The images to score on, or to train on, of `data`: a folder or a set of torchvision.

    A folder holds `train/` and `val/` (or `valid/` or `test/`) with class folders, or class folders
    alone, all to score on. A set is downloaded to `data_root`, by default `torchvision_data` beside
    the scripts. `names_file` names the classes: one a line in the order of the sorted folders (2
    before 10), or lines `folder<TAB>name` or `folder name`. Raises `InputError` for unusable data
    or names; `option` is the script's option for `data`.
    """
    root = Path(data).expanduser()
    if root.is_dir():
        found = _class_folders(root, is_train)
    elif data in TORCHVISION_SETS:
        root = data_root or from_here("torchvision_data")
        pictures = open_torchvision_set(data, root, is_train)
        name = f"{data}_{'train' if is_train else 'test'}"
        labels = labels_of(pictures)
        image = [str(root / name / str(number)) for number in range(len(labels))]
        names = class_names(data, pictures)
        found = LabelledImages(name, root, image, labels, names, pictures=pictures)
    else:
        raise InputError(
            f"{option} {data}: {'is not a folder' if root.exists() else 'no such folder'}, and no "
            f"data set of torchvision{near_names(str(data), TORCHVISION_SETS)}; the sets are "
            f"{', '.join(TORCHVISION_SETS)}"
        )
    found.classes = _named(found.classes, names_file)
    return found


def _class_folders(root: Path, is_train: bool) -> LabelledImages:
    scored = next((root / name for name in SCORED if class_folders(root / name)), None)
    split = root / "train" if is_train else scored or root
    folders = class_folders(split)
    names = [folder.name for folder in folders]
    if scored is None and (names == ["train"] or (is_train and names)):
        raise InputError(
            f"{root}: has train/, and no val/ (or valid/ or test/) beside it; move some images of "
            f"each class there, or name {root / 'train'} to score on its images"
        )
    if len(folders) < 2:
        found = f"only one class folder in it, {names[0]}" if names else "no class folders"
        raise InputError(
            f"{split}: {found}; give a folder with a folder of images for each class, or with "
            "train/ and val/ that have such folders in them"
        )
    if is_train and (unpaired := {folder.name for folder in class_folders(scored)} ^ set(names)):
        raise InputError(
            f"{root}: a linear probe needs the same class folders in {split} and {scored}; only "
            f"one of them has {listed(sorted(unpaired))}"
        )
    image, label = [], []
    for number, folder in enumerate(folders):
        image += [str(folder / file) for file in find_images(folder)]
        label += [number] * (len(image) - len(label))
    name = root.resolve().name + ("" if split is root else f"_{split.name}")
    return LabelledImages(name, root, image, label, names)


def _named(keys: list[str], file: Path | None) -> list[str]:
    """The names of the classes with these folders (or torchvision's names)."""
    if file is None:
        return words_of(keys)
    lines = read_lines(file, "class name")
    is_json = file.suffix.lower() == ".json"
    names = _names_in_json("\n".join(lines), file) if is_json else _names_by_key(lines, keys)
    if missing := [key for key in keys if names and not names.get(key)]:
        raise InputError(f"{file}: no name for {', '.join(missing[:5])}; write folder<TAB>name")
    if names:
        return [names[key] for key in keys]
    if len(lines) != len(keys):
        raise InputError(
            f"{file}: {len(lines)} class names, where there are {len(keys)} classes "
            f"({keys[0]} to {keys[-1]}); write one on each line, in this order"
        )
    return lines


def _names_by_key(lines: list[str], keys: list[str]) -> dict[str, str]:
    """Names by folder from lines `folder<TAB>name` or `folder name`, if most folders have one."""
    names, folders = {}, {*keys}
    for line in lines:
        starts = (line[: space.start()] for space in re.finditer(r"\s", line))
        if key := max(folders.intersection(starts), key=len, default=""):
            names[key] = line.removeprefix(key).strip()
    return names if len(names) > len(keys) / 2 else {}


def _names_in_json(text: str, file: Path) -> dict[str, str]:
    """Names by folder, `{"cat": "a cat"}`, or as in ImageNet's `{"0": ["n01440764", "tench"]}`."""
    names: dict[str, str] = {}
    try:
        for key, value in json.loads(text).items():
            *folders, name = [value] if isinstance(value, str) else value
            names |= dict.fromkeys([key, *folders], name.replace("_", " "))
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f'{file}: should be {{"folder": "name", ...}}, or as ImageNet\'s class '
                         'index, {"0": ["n01440764", "tench"], ...}') from None  # fmt: skip
    return names
