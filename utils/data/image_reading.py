"""Batches of decoded images, read by worker processes; others in the place of unreadable ones."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.errors import InputError
from utils.machine.interrupt import leave_signals_to_parent


class Loaded(NamedTuple):
    """Images of a batch.

    images    `[n, 3, r, r]`, on the CPU, or on the GPU that holds the cached set
    rows      their indices in the data set
    problems  {index: what is wrong} of images that could not be read
    """

    images: Tensor
    rows: list[int]
    problems: dict[int, str]


def read_batches(
    dataset: Dataset,
    batches: list[list[int]],
    num_workers: int,
    own: slice = slice(None),
    substitute: bool = False,
) -> Iterator[Loaded]:
    """For lists of indices, the images that `dataset` has there.

    `own` picks the part of every batch that this process reads. With `substitute` another image
    takes the place of one that cannot be read; without it such an image raises `InputError`.
    """
    loader = DataLoader(
        _Batches(dataset, batches, own, substitute),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the global one as it is
        worker_init_fn=leave_signals_to_parent,
    )
    for loaded in loader:
        if isinstance(loaded, InputError):
            raise loaded
        yield loaded


class _Batches(Dataset):
    """Item i is the i-th batch, or the `InputError` of an image in it. The error is returned, since
    one that a worker process raises arrives with the worker's traceback in its message."""

    def __init__(self, dataset: Dataset, batches: list[list[int]], own: slice, substitute: bool):
        self.dataset = dataset
        self.batches = batches
        self.own = own
        self.substitute = substitute

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Loaded | InputError:
        batch = self.batches[index]
        images, rows, problems = [], [], {}
        for row in batch[self.own]:
            for candidate in substitutes(row, len(self.dataset), batch, rows):
                try:
                    images.append(self.dataset[candidate][0])
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
    """`row`, then all other indices of n images, in the order in which they replace it if it cannot
    be read: those that are not `taken` come first."""
    yield row
    others = [other % n for other in range(row + 1, row + n)]
    in_use = set().union(*taken)
    yield from (other for other in others if other not in in_use)
    yield from (other for other in others if other in in_use)
