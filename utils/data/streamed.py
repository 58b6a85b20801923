"""Training data that is streamed from tar shards, on a disk or not, by webdataset."""

import hashlib
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from models.clip import CLIP
from models.errors import InputError, listed, one_line
from models.files import decoded, read_json
from models.preprocess import open_image
from utils.data.annotations import read_captions
from utils.data.caption_folders import caption_of, count_samples, endings_of

BUFFER = 1000  # samples, as files, among which each worker draws the next one


class Stream:
    """The shards of a training set, and their samples in all: an image with one caption each.

    `patterns` are folders of shards, or names as webdataset takes them: paths, URLs and commands
    `pipe:...`, with braces as in `{00000..00331}.tar`. The number of `samples` is read beside or
    from shards on a disk. Raises `InputError` without webdataset, if shards on a disk are missing
    or no tars, and where the number has to be given.
    """

    image = ()  # none is a file
    tokens = None  # not known before they come
    captions_of_an_image = 1

    def __init__(self, patterns: Sequence[str], samples: int | None = None):
        self.shards = [shard for pattern in patterns for shard in _expanded(pattern)]
        local = [Path(shard) for shard in self.shards if not _is_remote(shard)]
        if missing := [str(shard) for shard in local if not shard.is_file()]:
            raise InputError(f"--stream: {len(missing)} of {len(self.shards)} shards are missing: "
                             f"{listed(missing)}")  # fmt: skip
        for shard in local:
            if not tarfile.is_tarfile(shard):
                raise InputError(f"{shard}: is no tar; get a new copy")
        if not samples and (len(local) < len(self.shards) or {s.suffix for s in local} != {".tar"}):
            raise InputError("--stream: give --stream_samples N, the number of samples in all "
                             "shards, which only .tar files on a disk tell")  # fmt: skip
        self.samples = samples or _count(local)

    def __len__(self) -> int:
        return self.samples

    def prepare_for(self, model: CLIP) -> None:
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.context_length = model.context_length

    def fingerprint(self) -> str:
        """A digest of the shards' names and the number of samples."""
        names = [shard.rpartition("/")[2] for shard in self.shards]
        return hashlib.sha256(repr((names, self.samples)).encode()).hexdigest()


def _expanded(pattern: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise InputError("--stream needs webdataset; pip install webdataset") from None
    if Path(pattern).is_dir():
        found = [shard.as_posix() for shard in sorted(Path(pattern).glob("*.tar"))]
    else:
        # A backslash would end the meaning of a brace.
        is_path = os.sep == "\\" and not _is_remote(pattern)
        try:
            found = expand_urls(pattern.replace("\\", "/") if is_path else pattern)
        except (ValueError, AssertionError) as error:
            raise InputError(f"--stream {pattern}: {one_line(error)}") from None
    if not found:
        raise InputError(f"--stream {pattern}: no shards in it, NAME.tar")
    return found


def _is_remote(shard: str) -> bool:
    return "://" in shard or shard.startswith("pipe:")


def _count(shards: list[Path]) -> int:
    """The samples by img2dataset's `00000_stats.json` beside each shard, or else by its index."""
    files = (shard.with_name(f"{shard.stem}_stats.json") for shard in shards)
    found = [(read_json(file) or {}).get("successes") for file in files]
    if all(isinstance(number, int) for number in found):
        return sum(found)
    return sum(map(count_samples, shards))


class Part(NamedTuple):
    """What one worker adds to a batch: n samples."""

    images: Tensor | np.ndarray  # `[n, 3, r, r]`, uint8
    captions: list[str]
    problems: list[str]  # of samples that were left out


@dataclass
class StreamedParts(IterableDataset):
    """A process's part of the batches of an epoch, `rows` samples each, from the `start`-th on. Of
    w workers, each yields for each batch every w-th of its samples, from shards of its own; when
    these are used up, from those of another pass in another order.

    The first samples of a resumed epoch are read and dropped, also those that cannot be decoded.
    """

    shards: list[str]
    prepare: Callable[[Image.Image], Tensor]
    seed: tuple[int, int]  # of the run, and the epoch
    processes: tuple[int, int]  # the rank, and the number of processes
    rows: int
    batches: range
    problems: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Part | InputError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        bounds = range(self.batches.start, self.batches.stop + 1)
        before = [len(range(worker, batch * self.rows, workers)) for batch in bounds]
        samples = self._samples(worker, workers, skip=before[0])
        try:
            for first, last in pairwise(before):
                images, captions = zip(*islice(samples, last - first), strict=True)
                yield Part(torch.stack(images), list(captions), self.problems[:])
                self.problems.clear()
        except InputError as error:  # a raised one would arrive with the worker's traceback
            yield error

    def _samples(self, worker: int, workers: int, skip: int) -> Iterator[tuple[Tensor, str]]:
        """Images and captions without end. Raises `InputError` if none can be read."""
        import webdataset

        rank, size = self.processes
        for again in count():
            seed = (*self.seed, again)
            order = np.random.default_rng(seed).permutation(len(self.shards)).tolist()
            own = [self.shards[i] for i in order[rank * workers + worker :: size * workers]]
            samples = webdataset.DataPipeline(
                webdataset.SimpleShardList([f"file:{s}" if Path(s).drive else s for s in own]),
                webdataset.tarfile_to_samples(handler=self._note),
                webdataset.shuffle(BUFFER, rng=random.Random(f"{seed} {rank} {worker}")),
            )
            is_unreadable = True
            for sample in samples:
                if skip:
                    skip -= 1
                else:
                    try:
                        yield self._read(sample)
                    except InputError as error:
                        self.problems.append(str(error))
                        continue
                is_unreadable = False
            if is_unreadable:
                why = next(iter(self.problems), "they hold no samples")
                raise InputError(f"--stream: nothing can be read from {listed(own)}; {why}")

    def _read(self, sample: dict[str, bytes | str]) -> tuple[Tensor, str]:
        """The image and the caption of one of webdataset's samples. Raises `InputError`."""
        where = f"{sample.pop('__url__')}/{sample.pop('__key__')}"
        members = {f".{ending}": content for ending, content in sample.items()}
        try:
            image, ending = endings_of(members)
            captions = read_captions(caption_of(decoded(members[ending], ending), ending))
            if not captions:
                raise ValueError("its caption is empty")
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        pixels = self.prepare(open_image(f"{where}{image}", members[image]))
        return pixels, captions[self.seed[1] % len(captions)]

    def _note(self, error: Exception) -> bool:
        """Go on after an error of a shard, whose name webdataset adds to the arguments."""
        texts = [text for text in error.args if isinstance(text, str)]
        self.problems.append(one_line(": ".join(reversed(texts)) or repr(error)))
        return True
