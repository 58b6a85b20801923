"""Images and their captions, packed."""

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from utils.data.packed import Strings, StringsBuilder, packed, ranges, starts_of


class CaptionLists(Sequence[tuple[str, list[str]]]):
    """(image, captions) pairs: the captions of image i are those from `starts[i]` to
    `starts[i + 1]`."""

    def __init__(self, images: Strings, starts: np.ndarray, captions: Strings):
        self.images, self.starts, self.captions = images, starts, captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | slice) -> tuple[str, list[str]] | list:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        return self.images[i], self.captions[self.starts[i] : self.starts[i + 1]]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        captions = iter(self.captions)
        for image, count in zip(self.images, np.diff(self.starts).tolist(), strict=True):
            yield image, [next(captions) for _ in range(count)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None

    def take(self, rows: np.ndarray) -> "CaptionLists":
        """The pairs at these indices."""
        counts = np.diff(self.starts)[rows]
        captions = self.captions.take(ranges(self.starts[rows], counts))
        return CaptionLists(self.images.take(rows), starts_of(counts), captions)


class Entries:
    """Collects the entries of a caption file, of which several can be of one image."""

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.rows, self.digests, self.counts = array("q"), array("q"), array("q")
        self.captions = StringsBuilder()

    def add(self, image: str, captions: Sequence[str], digest: int = 0) -> None:
        row = self.row_of.setdefault(image, len(self.row_of))
        if captions:
            self.rows.append(row)
            self.digests.append(digest)
            self.counts.append(len(captions))
            self.captions.extend(captions)

    def pairs(self, without: Iterable[int] = ()) -> CaptionLists:
        """The images that have captions, in their order, each with those of all its entries but
        for the entries `without`."""
        rows, counts = np.array(self.rows), np.array(self.counts)
        starts = starts_of(counts)
        captions = self.captions.build()
        order = np.delete(np.arange(len(rows)), [*without])
        order = order[rows[order].argsort(kind="stable")]
        if not np.array_equal(order, np.arange(len(rows))):
            captions = captions.take(ranges(starts[order], counts[order]))
        of_image = np.bincount(rows[order], counts[order], len(self.row_of)).astype(np.int64)
        images = packed(self.row_of)
        if not of_image.all():
            images, of_image = images.take(np.flatnonzero(of_image)), of_image[of_image > 0]
        return CaptionLists(images, starts_of(of_image), captions)

    def copies(self) -> list[int]:
        """The entries to leave out: if all entries of an image are repeated equally often, each
        counts once."""
        entries, repeated = np.array([self.rows, self.digests]), []
        order = np.lexsort(entries[::-1])
        rows, digests = entries[:, order]
        is_again = (rows[1:] == rows[:-1]) & (digests[1:] == digests[:-1])
        for row in np.unique(rows[1:][is_again]):
            own = np.sort(order[slice(*np.searchsorted(rows, [row, row + 1]))])
            left = Counter(entries[1, own].tolist())
            often = math.gcd(*left.values())
            for entry, digest in zip(own.tolist(), entries[1, own].tolist(), strict=True):
                if left[digest] % often:
                    repeated.append(entry)
                left[digest] -= 1
        return repeated


def join_parts(parts: Iterable[CaptionLists]) -> CaptionLists:
    """The pairs of several lists; those of the same image are joined."""
    first, *others = parts
    if not others:
        return first
    entries = Entries()
    for part in (first, *others):
        for image, captions in part:
            entries.add(image, captions)
    return entries.pairs()
