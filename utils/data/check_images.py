"""A look at every image before training starts: which ones cannot be read."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from torch.utils.data import Dataset

from models.errors import InputError
from models.preprocess import open_image
from models.progress_bar import progress_bar
from utils.data.annotations import shared_images_warning


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
    but where the set's pixels are `cached`, and its `unreadable` tells what is wrong."""
    unread = chain.from_iterable(dataset.image for dataset in sets if dataset.cached is None)
    problems = chain.from_iterable(dataset.unreadable.values() for dataset in sets)
    broken = dict.fromkeys(chain(problems, check_images(list(dict.fromkeys(unread)), num_workers)))
    if broken:
        raise InputError("\n  ".join([f"{len(broken)} images cannot be read:", *broken]))


def check_images(images: list[str], num_workers: int = 0) -> list[str]:
    """Decode the image files at these paths, `num_workers` at a time, in threads. Returns "path:
    reason" for each that cannot be read, in their order."""
    problems = []
    with (
        ThreadPoolExecutor(max(1, num_workers)) as threads,
        progress_bar(
            total=len(images), desc="checking images", unit="img", disable=not images
        ) as bar,
    ):
        for problem in threads.map(_problem, images):
            bar.update()
            if problem:
                problems.append(problem)
    return problems


def _problem(path: str) -> str | None:
    try:
        open_image(path)
    except InputError as error:
        return str(error)
    return None
