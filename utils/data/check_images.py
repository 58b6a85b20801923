"""A look at every image before training starts: which ones cannot be read."""

from concurrent.futures import ThreadPoolExecutor

from models.errors import InputError
from models.preprocess import open_image
from models.progress_bar import progress_bar


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
