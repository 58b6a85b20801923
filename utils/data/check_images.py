"""A look at every image before training starts: which ones cannot be read."""

from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from models.errors import InputError
from models.preprocess import open_image
from utils.flickr8k_dataloader import Flickr8kDataset


def check_images(dataset: Flickr8kDataset, num_workers: int = 0) -> list[str]:
    """Decode every image of `dataset`, `num_workers` at a time, in threads. Returns "path: reason"
    for each image that cannot be read, in the order of the data set."""
    problems = []
    with (
        ThreadPoolExecutor(max(1, num_workers)) as threads,
        tqdm(total=len(dataset.image), desc=f"checking {dataset.split} images", unit="img") as bar,
    ):
        for problem in threads.map(_problem, dataset.image):
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
