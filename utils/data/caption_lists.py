"""Images and their captions, packed."""

from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from utils.data.packed import PackedSequence, Strings, StringsBuilder, ranges, starts_of


class CaptionLists(PackedSequence[tuple[str, list[str]]]):
    """(image, captions) pairs: the captions of image i are those from `starts[i]` to
    `starts[i + 1]`."""

    def __init__(self, images: Strings, starts: np.ndarray, captions: Strings):
        self.images, self.starts, self.captions = images, starts, captions

    def __len__(self) -> int:
        return len(self.images)

    def item(self, i: int) -> tuple[str, list[str]]:
        return self.images[i], self.captions[self.starts[i] : self.starts[i + 1]]

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        captions = iter(self.captions)
        for image, count in zip(self.images, np.diff(self.starts).tolist(), strict=True):
            yield image, [next(captions) for _ in range(count)]

    def take(self, rows: np.ndarray) -> "CaptionLists":
        """The pairs at these indices."""
        counts = np.diff(self.starts)[rows]
        captions = self.captions.take(ranges(self.starts[rows], counts))
        return CaptionLists(self.images.take(rows), starts_of(counts), captions)


class Entries:
    """Collects the entries of a caption file, of which several can be of one image."""

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.rows, self.counts = array("q"), array("q")
        self.captions = StringsBuilder()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.row_of)

    def add(self, image: str, captions: Sequence[str]) -> None:
        row = self.row_of.setdefault(image, len(self.row_of))
        if captions:
            self.rows.append(row)
            self.counts.append(len(captions))
            self.captions.extend(captions)

    def pairs(self) -> CaptionLists:
        """The images that have captions, in their order, each with those of all its entries."""
        rows, counts = np.array(self.rows), np.array(self.counts)
        starts = starts_of(counts)
        captions = self.captions.build()
        if (np.diff(rows) < 0).any():
            order = rows.argsort(kind="stable")
            captions = captions.take(ranges(starts[order], counts[order]))
        of_image = np.bincount(rows, counts, len(self)).astype(np.int64)
        images = StringsBuilder(self.row_of).build()
        if not of_image.all():
            images, of_image = images.take(np.flatnonzero(of_image)), of_image[of_image > 0]
        return CaptionLists(images, starts_of(of_image), captions)


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
