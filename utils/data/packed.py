"""Many strings or lists of indices without a Python object for each, which would take several times
as much memory; a worker process gets them as one array of bytes."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

T = TypeVar("T")
PIECE = 2**16  # strings that are packed, or unpacked to be iterated over, at a time


class PackedSequence(Sequence[T]):
    """A sequence whose elements are made by `item(i)`, for i from 0, when they are asked for."""

    def item(self, i: int) -> T:
        raise NotImplementedError

    def __getitem__(self, index: int | slice) -> T | list[T]:
        found = range(len(self))[index]
        return self.item(found) if isinstance(found, int) else [self.item(i) for i in found]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None


class Strings(PackedSequence[str]):
    """Strings in UTF-8 end to end: string i is `data[starts[i] : starts[i + 1]]`."""

    def __init__(self, data: np.ndarray, starts: np.ndarray):
        self.data, self.starts = data, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def item(self, i: int) -> str:
        content = self.data[self.starts[i] : self.starts[i + 1]].tobytes()
        return content.decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), PIECE):
            starts = self.starts[first : first + PIECE + 1]
            piece = self.data[starts[0] : starts[-1]].tobytes()
            if piece.isascii():  # decoding all at once is faster
                piece = piece.decode()
            for start, stop in pairwise((starts - starts[0]).tolist()):
                string = piece[start:stop]
                yield string if isinstance(string, str) else string.decode(errors="surrogatepass")

    def take(self, rows: np.ndarray) -> "Strings":
        """The strings at these indices."""
        first, sizes = self.starts[rows], np.diff(self.starts)[rows]
        parts = [
            self.data[ranges(first[i : i + PIECE], sizes[i : i + PIECE])]
            for i in range(0, len(rows), PIECE)
        ]
        return Strings(np.concatenate([np.empty(0, np.uint8), *parts]), starts_of(sizes))


class StringsBuilder:
    """Collects strings for `Strings`."""

    def __init__(self, strings: Iterable[str] = ()):
        self.data = bytearray()
        self.sizes = array("q")
        self.waiting = [*strings]

    def extend(self, strings: Iterable[str]) -> None:
        self.waiting += strings
        if len(self.waiting) >= PIECE:
            self._pack()

    def build(self) -> Strings:
        self._pack()
        return Strings(np.frombuffer(self.data, np.uint8), starts_of(self.sizes))

    def _pack(self) -> None:
        strings, joined = self.waiting, "".join(self.waiting)
        if not joined.isascii():  # encoding all at once is faster
            strings = [string.encode(errors="surrogatepass") for string in strings]
        self.data += joined.encode(errors="surrogatepass")
        self.sizes.extend(map(len, strings))
        self.waiting.clear()


class Computed(Mapping[int, T]):
    """A mapping from 0, 1, ... n - 1 to the values of a function."""

    def __init__(self, n: int, function: Callable[[int], T]):
        self.n, self.function = n, function

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))

    def __getitem__(self, key: int) -> T:
        if key not in range(self.n):
            raise KeyError(key)
        return self.function(key)


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    """Where parts of these sizes start that lie end to end, and where the last one ends: int64
    `[n + 1]`."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts


def ranges(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers from `first[i]` to `first[i] + sizes[i] - 1` for each i, end to end."""
    starts = starts_of(sizes)
    return np.repeat(first - starts[:-1], sizes) + np.arange(starts[-1])
