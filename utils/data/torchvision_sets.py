"""The classified data sets of torchvision, which are downloaded if needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from models.errors import InputError, one_line

LABELS = ("targets", "labels", "_labels", "y")  # where torchvision's classes keep the labels


class TorchvisionSet(NamedTuple):
    """How to load one of torchvision's data sets."""

    loader: str  # its class in `torchvision.datasets`
    scored: dict[str, object]  # arguments of the class for the images to score on
    train: dict[str, object] | None  # for training images; None if the set has no splits
    names: Sequence[str] | None = None  # of the classes, if torchvision's are not readable


BY_TRAIN = {"train": False}, {"train": True}
BY_SPLIT = {"split": "test"}, {"split": "train"}
WITH_TRAINVAL = {"split": "test"}, {"split": "trainval"}
WITH_VAL = {"split": "val"}, {"split": "train"}
DIGITS = [str(digit) for digit in range(10)]
EUROSAT_NAMES = ["annual crop land", "forest", "herbaceous vegetation", "highway",
                 "industrial buildings", "pasture", "permanent crop land", "residential buildings",
                 "river", "sea or lake"]  # fmt: skip
TORCHVISION_SETS = {
    "caltech101": TorchvisionSet("Caltech101", {}, None),
    "cifar10": TorchvisionSet("CIFAR10", *BY_TRAIN),
    "cifar100": TorchvisionSet("CIFAR100", *BY_TRAIN),
    "country211": TorchvisionSet("Country211", *BY_SPLIT),
    "dtd": TorchvisionSet("DTD", *BY_SPLIT),
    "eurosat": TorchvisionSet("EuroSAT", {}, None, EUROSAT_NAMES),
    "fashion_mnist": TorchvisionSet("FashionMNIST", *BY_TRAIN),
    "fgvc_aircraft": TorchvisionSet("FGVCAircraft", *WITH_TRAINVAL),
    "flowers102": TorchvisionSet("Flowers102", *BY_SPLIT),
    "food101": TorchvisionSet("Food101", *BY_SPLIT),
    "imagenet": TorchvisionSet("ImageNet", *WITH_VAL),
    "imagenette": TorchvisionSet("Imagenette", *WITH_VAL),
    "mnist": TorchvisionSet("MNIST", *BY_TRAIN, DIGITS),
    "oxford_pets": TorchvisionSet("OxfordIIITPet", *WITH_TRAINVAL),
    "stanford_cars": TorchvisionSet("StanfordCars", *BY_SPLIT),
    "stl10": TorchvisionSet("STL10", *BY_SPLIT),
    "sun397": TorchvisionSet("SUN397", {}, None),
    "svhn": TorchvisionSet("SVHN", *BY_SPLIT, DIGITS),
}


def open_torchvision_set(name: str, root: Path, is_train: bool) -> Dataset:
    """A data set of `TORCHVISION_SETS` in `root`, downloaded if needed; or `InputError`."""
    import torchvision  # takes seconds

    known = TORCHVISION_SETS[name]
    split = known.train if is_train else known.scored
    if split is None:
        raise InputError(f"{name}: has no training images of its own; leave --linear_probe out")
    loader = getattr(torchvision.datasets, known.loader)
    downloading = {} if name == "imagenet" else {"download": True}  # ImageNet has no such option
    for arguments in (split, split | downloading):
        try:
            return loader(root, **arguments)
        except Exception as error:  # torchvision passes on those of zip files, scipy, ...
            problem = error
    raise InputError(
        f"{name}: is not in {root}, or not whole, and cannot be downloaded ({one_line(problem)}); "
        f"put there what torchvision.datasets.{known.loader} reads, and run this again"
    ) from problem


def class_names(name: str, images: Dataset) -> list[str]:
    """The names of the classes of a set of `TORCHVISION_SETS`, in the order of its labels."""
    names = TORCHVISION_SETS[name].names
    if names is None:
        names = images.categories if hasattr(images, "categories") else images.classes
    return [name if isinstance(name, str) else name[0] for name in names]  # without synonyms


def labels_of(images: Dataset) -> list[int]:
    """The labels of all images of a data set of torchvision, without decoding any."""
    for attribute in LABELS:
        if hasattr(images, attribute):
            return [int(label) for label in getattr(images, attribute)]
    return [int(label) for _, label in images._samples]
