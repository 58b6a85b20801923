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
    source: str  # addresses of its archives
    folder: str = ""  # where torchvision looks for them, below the folder of all sets
    names: Sequence[str] | None = None  # of the classes, if torchvision's are not readable


BY_TRAIN = {"train": False}, {"train": True}
BY_SPLIT = {"split": "test"}, {"split": "train"}
WITH_TRAINVAL = {"split": "test"}, {"split": "trainval"}
WITH_VAL = {"split": "val"}, {"split": "train"}
DIGITS = [str(digit) for digit in range(10)]
EUROSAT_NAMES = ["annual crop land", "forest", "herbaceous vegetation", "highway",
                 "industrial buildings", "pasture", "permanent crop land", "residential buildings",
                 "river", "sea or lake"]  # fmt: skip
GTSRB_SIGNS = (
    "speed limit 20, speed limit 30, speed limit 50, speed limit 60, speed limit 70, speed "
    "limit 80, end of speed limit 80, speed limit 100, speed limit 120, no overtaking, no "
    "overtaking by trucks, right of way at the next crossing, priority road, give way, stop, "
    "no vehicles, no trucks, no entry, danger, left bend, right bend, double bend, uneven "
    "road, slippery road, road narrows on the right, road works, traffic lights, pedestrians, "
    "children, bicycles, ice and snow, wild animals, end of all limits, turn right, turn "
    "left, straight ahead, straight ahead or right, straight ahead or left, keep right, keep "
    "left, roundabout, end of no overtaking, end of no overtaking by trucks"
)
GTSRB_NAMES = [f"{sign} sign" for sign in GTSRB_SIGNS.split(", ")]

OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
EUROSAT = "https://huggingface.co/datasets/torchgeo/eurosat/resolve/main/EuroSAT.zip"
ILSVRC = "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_val.tar and ILSVRC2012_img_train.tar"
TORCHVISION_SETS = {name: TorchvisionSet(*row) for name, row in {
    "caltech101": ("Caltech101", {}, None,
        "https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip", "caltech101"),
    "cifar10": ("CIFAR10", *BY_TRAIN, "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", *BY_TRAIN,
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "country211": ("Country211", *BY_SPLIT,
        "https://openaipublic.azureedge.net/clip/data/country211.tgz"),
    "dtd": ("DTD", *BY_SPLIT, f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz", "dtd"),
    "eurosat": ("EuroSAT", {}, None, EUROSAT, "eurosat", EUROSAT_NAMES),
    "fashion_mnist": ("FashionMNIST", *BY_TRAIN, f"the four .gz of {ZALANDO}",
        "FashionMNIST/raw"),
    "fgvc_aircraft": ("FGVCAircraft", *WITH_TRAINVAL,
        f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz"),
    "flowers102": ("Flowers102", *BY_SPLIT,
        f"102flowers.tgz, imagelabels.mat and setid.mat of {OXFORD}/flowers/102/", "flowers-102"),
    "food101": ("Food101", *BY_SPLIT, "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"),
    "gtsrb": ("GTSRB", *BY_SPLIT, "GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and "
        f"GTSRB_Final_Test_GT.zip of {ERDA}", "gtsrb", GTSRB_NAMES),
    "imagenet": ("ImageNet", *WITH_VAL, f"{ILSVRC} of https://image-net.org"),
    "imagenette": ("Imagenette", *WITH_VAL,
        "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz"),
    "mnist": ("MNIST", *BY_TRAIN, "the four .gz of https://ossci-datasets.s3.amazonaws.com/mnist/",
        "MNIST/raw", DIGITS),
    "oxford_pets": ("OxfordIIITPet", *WITH_TRAINVAL,
        f"images.tar.gz and annotations.tar.gz of {OXFORD}/pets/data/", "oxford-iiit-pet"),
    "stanford_cars": ("StanfordCars", *BY_SPLIT, "cars_train/, cars_test/, devkit/ and "
        "cars_test_annos_withlabels.mat, no longer published by their authors,", "stanford_cars"),
    "stl10": ("STL10", *BY_SPLIT, "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
    "sun397": ("SUN397", {}, None,
        "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz"),
    "svhn": ("SVHN", *BY_SPLIT, "train_32x32.mat and test_32x32.mat of "
        "http://ufldl.stanford.edu/housenumbers/", "", DIGITS),
}.items()}  # fmt: skip


def open_torchvision_set(name: str, root: Path, is_train: bool) -> Dataset:
    """A data set of `TORCHVISION_SETS` in `root`, downloaded if needed. Raises `InputError` for a
    set that has no such images, or cannot be read or downloaded."""
    import torchvision  # takes seconds

    known = TORCHVISION_SETS[name]
    split = known.train if is_train else known.scored
    if split is None:
        raise InputError(
            f"{name}: has no training images of its own in torchvision; leave --linear_probe out, "
            "or put the images into class folders, in train/ and val/"
        )
    loader = getattr(torchvision.datasets, known.loader)
    downloading = {} if name == "imagenet" else {"download": True}  # ImageNet has no such option
    for arguments in (split, split | downloading):
        try:
            return loader(root, **arguments)
        except Exception as error:  # torchvision passes on those of zip files, scipy, ...
            problem = error
    raise InputError(
        f"{name}: is not in {root}, or not whole, and cannot be downloaded ({one_line(problem)}); "
        f"put {known.source} into {root / known.folder} and run this again"
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
