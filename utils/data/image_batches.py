"""Batches of decoded images, read by worker processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from models.errors import InputError, one_line
from models.preprocess import open_image, upright_rgb
from utils.data.containers import Place, in_container, read_contained
from utils.data.packed import PackedSequence
from utils.machine.interrupt import leave_signals_to_parent, signals_held_back
from utils.machine.memory import CONTINUE, free_shared_memory


@dataclass(frozen=True, eq=False)
class Paths(PackedSequence[str]):
    """The paths of images by their `names` below `root`, with slashes."""

    root: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def item(self, i: int) -> str:
        return str(self.root / self.names[i])

    def __iter__(self) -> Iterator[str]:
        before = str(self.root / "_")[:-1]  # joining paths takes ten times as long
        return (before + name.replace("/", os.sep) for name in self.names)


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of a data set: all that worker processes get of it. `reader[i]` raises
    `InputError` for an unreadable image."""

    paths: Sequence[str]
    prepare: Callable[[Image.Image], Tensor]  # makes a tensor of an RGB image
    places: np.ndarray | None = None  # `[n, 2]`, in containers
    pictures: Dataset | None = None  # the set of torchvision that reads them; None for files

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.pictures is None:
            place = None if self.places is None else self.places[index].tolist()
            return self.prepare(read_image(self.paths[index], place))
        try:
            picture = upright_rgb(self.pictures[index][0])
        except Exception as error:  # a broken file can make Pillow's decoders raise anything
            problem = f"not a readable image ({one_line(error)})"
            raise InputError(f"{self.paths[index]}: {problem}") from None
        return self.prepare(picture)


def read_image(path: str, place: Place | None = None) -> Image.Image:
    """The image in a file, as by `open_image`, or in a container, at `place` if that is known."""
    inside = in_container(path)
    return open_image(path, read_contained(*inside, place) if inside else None)


class Loaded(NamedTuple):
    """Images of a batch."""

    images: Tensor | np.ndarray  # `[n, 3, r, r]`; an array where shared memory has no room
    rows: list[int]  # their indices in the data set
    problems: dict[int, str]  # {index: problem} of unreadable images


def read_batches(
    reader: Sequence[Tensor],
    batches: Iterable[list[int]],
    num_workers: int,
    part: slice = slice(None),
    substitute: bool = False,
) -> Iterator[Loaded]:
    """The images at lists of indices in `reader`, of which this process reads `part` of each. With
    `substitute`, another takes the place of an unreadable one, else `InputError`."""
    return read_in_workers(_Batches(reader, part, substitute), num_workers, batches)


def read_in_workers(
    dataset: Dataset, num_workers: int, sampler: Iterable[Any] | None = None
) -> Iterator[Any]:
    """What `dataset` has at each of `sampler`, or yields: tuples with `images`. Raises `InputError`
    where it has one, and for a killed worker."""
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_initialized(),  # not on a GPU that --device cpu leaves alone
        generator=torch.Generator(),  # leaves the global one as it is
        worker_init_fn=leave_signals_to_parent,
    )
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported only once
    with signals_held_back():
        arriving = iter(loader)
    try:
        for loaded in arriving:
            if isinstance(loaded, InputError):
                raise loaded
            yield loaded._replace(images=torch.as_tensor(loaded.images))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            "a process that reads images was killed, as a rule because main memory is full: lower "
            f"--num_workers or --batch_size; {CONTINUE}"
        ) from error


def collate(loaded: Any) -> Any:
    """What a worker sends to its parent: images in shared memory or, without room for two batches
    of every worker, as an array through a pipe. (Linux may promise shared memory that it lacks, and
    kill the worker that writes to it.)"""
    worker = get_worker_info()
    if worker is None or isinstance(loaded, InputError):
        return loaded
    free = free_shared_memory()
    if free is None or free >= 2 * worker.num_workers * loaded.images.nbytes:
        with suppress(RuntimeError):  # another program was faster
            return loaded._replace(images=loaded.images.share_memory_())
    return loaded._replace(images=loaded.images.numpy())


class _Batches(Dataset):
    """The images of a batch by its list of indices, or an `InputError`: a raised one would arrive
    with the worker's traceback in its message."""

    def __init__(self, reader: Sequence[Tensor], part: slice, substitute: bool):
        self.reader, self.part, self.substitute = reader, part, substitute

    def __getitem__(self, batch: list[int]) -> Loaded | InputError:
        images, rows, problems = [], [], {}
        for row in batch[self.part]:
            for candidate in substitutes(row, len(self.reader), batch, rows):
                try:
                    images.append(self.reader[candidate])
                    rows.append(candidate)
                    break
                except InputError as error:
                    if not self.substitute:
                        return error
                    problems[candidate] = str(error)
            else:
                return InputError(f"none of the images can be read; {problems[row]}")
        return Loaded(torch.stack(images), rows, problems)


def substitutes(row: int, n: int, *taken: list[int]) -> Iterator[int]:
    """`row`, then the other indices of n images that may replace it, the `taken` ones last."""
    yield row
    others = (other % n for other in range(row + 1, row + n))
    last = set().union(*taken)
    yield from (other for other in others if other not in last)
    yield from (other % n for other in range(row + 1, row + n) if other % n in last)
