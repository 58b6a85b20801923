"""Training data that is streamed from tar shards, on a disk or not, by webdataset."""

import hashlib
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from models.clip import CLIP
from models.errors import InputError, listed, one_line
from models.files import decoded, read_json
from models.preprocess import open_image
from utils.data.annotations import collect, read_captions
from utils.data.caption_folders import caption_of, endings_of, shard_records
from utils.machine.memory import CONTINUE
from utils.runs.arguments import is_remote

BUFFER = 1000  # samples, as files, among which each worker draws the next one


class Stream:
    """The shards of a training set, with so many samples in all: an image and one caption each.
    `patterns` are webdataset's: paths, URLs and commands `pipe:...`, with braces as in
    `{00000..00331}.tar`. Tars on a disk, or img2dataset's `00000_stats.json` beside each, tell the
    number of `samples`. Raises `InputError` where neither does, and without usable shards."""

    image = ()  # none is a file
    tokens = None  # not known before they come
    starts = np.arange(2)  # one caption an image

    def __init__(self, patterns: Sequence[str], samples: int | None = None):
        self.shards = [shard for pattern in patterns for shard in _expanded(pattern)]
        local = [Path(shard) for shard in self.shards if not is_remote(shard)]
        if lost := [str(s) for s in local if not (s.is_file() and tarfile.is_tarfile(s))]:
            raise InputError(f"--stream: {len(lost)} of {len(self.shards)} shards are missing or "
                             f"no tars: {listed(lost)}; mend the path or the files")  # fmt: skip
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
    if os.sep == "\\" and not is_remote(pattern):
        pattern = pattern.replace("\\", "/")  # before a brace, \ would take away its meaning
    try:
        return expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise InputError(f"--stream {pattern}: {one_line(error)}") from None


def _count(shards: list[Path]) -> int:
    stats = (read_json(shard.with_name(f"{shard.stem}_stats.json")) for shard in shards)
    found = [(content or {}).get("successes") for content in stats]
    if all(type(number) is int and number > 0 for number in found):
        return sum(found)
    parts = (collect(shard, shard_records(shard), str) for shard in shards)
    return sum(len(pairs) for part in parts for pairs in part.values())


class Part(NamedTuple):
    """What one worker adds to a batch: n samples."""

    images: Tensor | np.ndarray  # `[n, 3, r, r]`, uint8
    captions: list[str]
    problems: list[str]  # of samples that were left out


@dataclass
class StreamedParts(IterableDataset):
    """A process's part of the `batches` of an epoch, `rows` samples each. Of w workers, each yields
    every w-th of them, from shards of its own, which the epoch shuffles, then from the next one's.
    The samples of a resumed epoch's first batches are read and dropped, also broken ones."""

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
        """Images and captions without end. Raises `InputError` if no shard has any."""
        import webdataset
        from webdataset.gopen import gopen_schemes

        gopen_schemes.update(http=_curl, https=_curl)
        order = np.random.default_rng(self.seed).permutation(len(self.shards)).tolist()
        rank, size = self.processes
        readers, fruitless = size * workers, 0
        for reader in count(rank * workers + worker):  # then the next one's shards
            own = [self.shards[i] for i in order[reader % readers :: readers]]
            own = [f"file:{s}" if s[1:2] == ":" else s for s in own]  # C: would be a protocol
            samples = webdataset.DataPipeline(
                webdataset.SimpleShardList(own),
                webdataset.tarfile_to_samples(handler=self._note),
                webdataset.shuffle(BUFFER, rng=random.Random(f"{self.seed} {reader}")),
            )
            fruitless += 1
            for sample in samples:
                try:
                    if skip:
                        skip -= 1
                    else:
                        yield self._read(sample)
                    fruitless = 0
                except InputError as error:
                    self.problems.append(str(error))
            if fruitless == readers:
                why = next(iter(self.problems), "it is empty")
                raise InputError("stream: no sample of any shard can be read, of which the files "
                                 f"follow each other; the first: {why}; {CONTINUE}")  # fmt: skip

    def _read(self, sample: dict[str, bytes | str]) -> tuple[Tensor, str]:
        """The image and the caption of one of webdataset's samples. Raises `InputError`."""
        where = f"{sample['__url__']}/{sample['__key__']}"
        members = {f".{name}": content for name, content in sample.items() if name[:2] != "__"}
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
        problem = one_line(": ".join(reversed(texts)) or repr(error))
        if code := re.search(r"exit (\d+) \(read\)", problem):
            problem = f"{texts[-1]}: its command, or curl, ended with code {code[1]}"
        self.problems.append(problem)
        return True


def _curl(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    """Read an address, as webdataset does, until no byte has come for a minute."""
    from webdataset.gopen import Pipe

    command = ["curl", "-fsL", "--speed-limit", "1", "--speed-time", "60", url]
    return Pipe(command, mode=mode, bufsize=bufsize, ignore_status=[141, 23])
