"""A look at every image before training starts: which ones cannot be read."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from models.errors import InputError
from models.preprocess import open_image
from models.progress_bar import progress_bar
from utils.data.annotations import shared_images_warning


def check_splits(images: dict[str, list[str]], num_workers: int, train_too: bool = False) -> None:
    """Warn of training images that are in other splits as well, and read the images of the others;
    with `train_too`, also those to train on. `images` are paths by split. Raises `InputError`
    with a list of those that cannot be read."""
    train = images["train"]
    held_out = {split: paths for split, paths in images.items() if split != "train"}
    for split, paths in held_out.items():
        if warning := shared_images_warning(train, paths, split):
            print(f"warning: {warning}")
    checked = dict.fromkeys(chain(train if train_too else (), *held_out.values()))
    if broken := check_images(list(checked), num_workers):
        raise InputError("\n  ".join([f"{len(broken)} images cannot be read:", *broken]))


def check_images(images: list[str], num_workers: int = 0) -> list[str]:
    """Decode the image files at these paths, `num_workers` at a time, in threads. Returns "path:
    reason" for each that cannot be read, in their order."""
    problems = []
    with (
        ThreadPoolExecutor(max(1, num_workers)) as threads,
        progress_bar(total=len(images), desc="checking images", unit="img") as bar,
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
