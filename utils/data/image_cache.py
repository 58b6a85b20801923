"""Decoded images in one memory-mapped file, so that each is decoded only once.

The file holds the uint8 pixels, image after image, a fingerprint of the image files, and as JSON
why images are unreadable, by index. With another fingerprint it is stale and is written anew.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.errors import InputError
from models.files import file_version
from models.preprocess import Preprocess
from models.progress_bar import progress_bar
from utils.data.containers import in_container
from utils.data.image_batches import read_batches
from utils.runs.files import atomic_write

FORMAT = 4  # of the file; raise it when `models.preprocess.resize_and_crop` makes other pixels
BUILD_BATCH = 32  # images decoded at a time


def decode_once(
    dataset: Dataset,
    name: str,
    folder: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> tuple[Tensor, dict[int, str]]:
    """The pixels of all images, uint8 `[n, 3, side, side]`, and {index: problem} of the unreadable
    images, which others replace.

    They are in the file `<name>_<side>.pixels` in `folder` (by default `.cache` in the data set's
    root), which all runs share, or on a GPU if they take, with those of other sets, at most a
    quarter of its free memory. `dataset` has `root`, the paths `image` below it, `preprocess` and a
    `reader`. Raises `InputError` if the file cannot be written.
    """
    folder = dataset.root.resolve() / ".cache" if folder is None else Path(folder).expanduser()
    file = folder / f"{name}_{dataset.preprocess.side}.pixels"
    rows = [rows.tolist() for rows in torch.arange(len(dataset)).split(BUILD_BATCH)]
    read = read_batches(dataset.reader, rows, num_workers, substitute=True)
    batches = ((loaded.images, loaded.problems) for loaded in read)
    pixels, reasons = cached_pixels(file, dataset, batches)
    if torch.device(device).type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0]
        if taken + pixels.nbytes <= (taken + free) / 4:
            pixels = pixels.to(device)
    return pixels, {row: f"{dataset.image[row]}{reasons[row]}" for row in sorted(reasons)}


def cached_pixels(
    file: Path, dataset: Dataset, batches: Iterable[tuple[Tensor, dict[int, str]]]
) -> tuple[Tensor, dict[int, str]]:
    """The pixels of all images, mapped from `file`, read-only, and {index: reason} of unreadable
    ones: their problem without their path, since the data set may move. If `file` is missing or
    stale, it is written from `batches`: the images in their order, and the problems of unreadable
    ones. Several runs may do so at once."""
    side = dataset.preprocess.side
    shape = (len(dataset), 3, side, side)
    fingerprint = _fingerprint(dataset.root, dataset.image, dataset.preprocess)
    if (mapped := _mapped(file, shape, fingerprint)) is not None:
        return mapped
    needed = math.prod(shape)  # bytes
    reasons: dict[int, str] = {}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(file.parent).free
        if needed > free:  # rather than after hours
            raise OSError(errno.ENOSPC, f"the disk has {free / 1e6:,.0f} MB left")
        with (
            atomic_write(file) as temporary,
            temporary.open("wb") as stream,
            progress_bar(total=len(dataset), desc=f"writing {file.name}", unit="img") as bar,
        ):
            for images, problems in batches:
                stream.write(images.numpy())
                for row, problem in problems.items():
                    reasons[row] = problem.removeprefix(dataset.image[row])
                bar.update(len(images))
            stream.write(fingerprint)
            stream.write(json.dumps(reasons).encode())
    except OSError as error:
        raise InputError(
            f"{file}: cannot be written ({error.strerror or error}); it takes {needed / 1e6:,.0f} "
            "MB. Make room, name a folder (--cache FOLDER), or leave --cache and --retention out"
        ) from error
    return _mapped(file, shape, fingerprint)


def _fingerprint(root: Path, images: list[str], preprocess: Preprocess) -> bytes:
    """32 bytes that change with the image files, the preprocessing and Pillow, not with `root`."""
    how = (preprocess.side, preprocess.interpolation, preprocess.resize_mode)
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {how}\n".encode())
    for image in images:
        path = Path(image)
        file, _ = in_container(path) or (path, "")
        digest.update(f"{file_version(file)} {path.relative_to(root).as_posix()}\n".encode())
    return digest.digest()


def _mapped(
    file: Path, shape: tuple[int, ...], fingerprint: bytes
) -> tuple[Tensor, dict[int, str]] | None:
    """The pixels and the reasons in `file`; None if it is missing or stale."""
    try:
        with file.open("rb") as stream:
            stream.seek(math.prod(shape))
            if stream.read(len(fingerprint)) != fingerprint:
                return None
            reasons = {int(row): reason for row, reason in json.loads(stream.read()).items()}
            pixels = np.memmap(stream, np.uint8, "r", shape=shape)
    except (OSError, ValueError):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors; nobody writes to this one
        return torch.from_numpy(pixels), reasons


def gather(pixels: Tensor, batches: list[list[int]]) -> Iterator[Tensor]:
    """Batches of images, `[n, 3, r, r]`, for lists of indices, on the device of `pixels`."""
    if not batches:  # a process may have none of a small set
        return
    indices = torch.tensor([index for batch in batches for index in batch], device=pixels.device)
    indices = indices.split([len(batch) for batch in batches])
    if pixels.is_cuda:
        yield from (pixels.index_select(0, rows) for rows in indices)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:  # prepares the next batch meanwhile
        coming = thread.submit(_gather_pinned, pixels, indices[0])
        for rows in indices[1:]:
            images = coming.result()
            coming = thread.submit(_gather_pinned, pixels, rows)
            yield images
        yield coming.result()


def _gather_pinned(pixels: Tensor, rows: Tensor) -> Tensor:
    """A batch from the file; if a GPU is in use, in pinned memory, to copy it without waiting."""
    shape = (len(rows), *pixels.shape[1:])
    images = torch.empty(shape, dtype=pixels.dtype, pin_memory=torch.cuda.is_initialized())
    return torch.index_select(pixels, 0, rows, out=images)
