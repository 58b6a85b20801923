"""Captioned images: the data set, and the batches to train on."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models.clip import CLIP
from models.config import CONTEXT_LENGTH
from models.device import upload
from models.errors import InputError
from models.preprocess import Preprocess
from models.tokens import TokenizedTexts, clip_tokenizer
from utils.data.annotations import caption_file, read_annotations, why_missing
from utils.data.augment import crop, draw_crops, draw_recolourings, recolour, reword
from utils.data.caption_lists import CaptionLists, join_parts
from utils.data.image_batches import (
    ImageReader,
    Loaded,
    Paths,
    read_batches,
    read_in_workers,
    substitutes,
)
from utils.data.image_cache import decode_once, gather
from utils.data.image_files import locate
from utils.data.packed import Computed, ranges, starts_of
from utils.data.streamed import Stream, StreamedParts
from utils.data.unlabelled import Unlabelled
from utils.machine.processes import ALONE, Processes

ALIKE = (  # the end of a warning
    "equal as far as the model reads them, so that it cannot tell them apart: shorten how they "
    "start, or take a model with a longer context"
)


class Flickr8kDataset(Dataset):
    """Images and their captions, from `{language}_{split}.json` (or .jsonl, .csv, .tsv) in
    `root_dir`; with several languages the captions in all of them.

    `split` is "train", "val" or "test"; without it, `is_train` chooses between the first two.
    `dataset[i]` is (image, captions): uint8 pixels `[3, target_shape, target_shape]`, resized
    and cropped as in CLIP, or what `transform` makes of the PIL image; and strings. `model` is for
    `prepare_for`. Raises `InputError` for unusable caption files and for missing images.

    Captions with equal tokens before cutting are one text, a positive of every image that has it;
    with `plain_protocol` a caption is a positive of its own image alone.

    image         paths of the image files
    text          all captions, image by image
    own_captions  {image index: [indices of its own captions]}
    img_to_txt    {image index: [indices of all captions that are its positives]}
    txt_to_img    {caption index: index of the image that is its positive, or a list of several}
    """

    def __init__(
        self,
        root_dir: str | os.PathLike,
        target_shape: int = 224,
        language: str | Sequence[str] = "en",
        is_train: bool = True,
        transform: Callable[[Image.Image], Tensor] | None = None,
        plain_protocol: bool = False,
        model: CLIP | None = None,
        split: str | None = None,
    ):
        self.root = Path(root_dir).expanduser()
        self.split = split or ("train" if is_train else "val")
        self.preprocess = Preprocess(target_shape)
        self.tokenizer = clip_tokenizer()
        self.context_length = CONTEXT_LENGTH
        if model:
            self.prepare_for(model)
        self.transform = transform
        self.plain_protocol = plain_protocol
        self.cached: Tensor | None = None
        self.cached_rows: np.ndarray | None = None  # of the images of a subset, in `cached`
        self.unreadable: dict[int, str] = {}  # {image index: problem}, found by `cache`
        languages = dict.fromkeys([language] if isinstance(language, str) else language)
        files = {name: caption_file(self.root, name, self.split) for name in languages}
        self._hold(join_parts(read_annotations(f, self.split, la) for la, f in files.items()))
        self.places = self._check_images_exist()  # in containers

    def sample(self, images: int) -> "Flickr8kDataset":
        """So many of the images, drawn at random, always in the same way, in their order; the set
        itself if it has no more. To be called after `cache`."""
        if images >= len(self):
            return self
        return self.subset(np.sort(np.random.default_rng(0).permutation(len(self))[:images]))

    def subset(self, images: Sequence[int]) -> "Flickr8kDataset":
        """These of the images with their captions. To be called after `cache`."""
        rows = np.asarray(images)
        part = self._without("tokens", "text_ids", "_images_of", "_captions_of")
        part._hold(CaptionLists(self.names, self.starts, self.text).take(rows))
        part.cached_rows = rows if self.cached_rows is None else self.cached_rows[rows]
        part.places = None if self.places is None else self.places[rows]
        part.unreadable = {
            i: self.unreadable[row] for i, row in enumerate(rows.tolist()) if row in self.unreadable
        }
        return part

    def plain(self) -> "Flickr8kDataset":
        """The same data set with `plain_protocol`."""
        part = self._without("text_ids", "_images_of", "_captions_of")
        part.plain_protocol = True
        return part

    def _without(self, *computed: str) -> "Flickr8kDataset":
        """A copy that computes these properties anew."""
        part = copy(self)
        for name in computed:
            vars(part).pop(name, None)
        return part

    def _hold(self, lists: CaptionLists) -> None:
        self.names = lists.images  # paths below the root, with slashes
        self.image = Paths(self.root, lists.images)
        self.text = lists.captions
        self.starts = lists.starts  # captions of image i: from starts[i] to starts[i + 1]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        index = range(len(self))[index]  # an IndexError ends a loop
        return self.reader[index], [self.text[caption] for caption in self.own_captions[index]]

    @property
    def reader(self) -> ImageReader:
        prepare = self.transform or self.preprocess.resize_and_crop
        return ImageReader(self.image, prepare, self.places)

    @property
    def own_captions(self) -> Mapping[int, list[int]]:
        return Computed(len(self), self._own_captions)

    def _own_captions(self, image: int) -> list[int]:
        return [*range(*self.starts[image : image + 2].tolist())]

    def prepare_for(self, model: CLIP) -> None:
        """Prepare images and captions for `model`; to be called before either is used."""
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.context_length = model.context_length

    @cached_property
    def tokens(self) -> TokenizedTexts:
        """All captions as token ids; `tokens[rows]` is int32 `[len(rows), context_length]`."""
        return TokenizedTexts(self.tokenizer, self.text, self.context_length)

    @cached_property
    def text_ids(self) -> Tensor:
        """For each caption the index of the first caption that is the same text, `[captions]`."""
        return torch.arange(len(self.text)) if self.plain_protocol else self.tokens.first_equal

    @cached_property
    def _images_of(self) -> tuple[np.ndarray, np.ndarray]:
        """The images that have text i of `text_ids`: of the second array, from place i of the
        first to the next one."""
        images = np.repeat(np.arange(len(self)), np.diff(self.starts))
        pairs = np.sort(self.text_ids.numpy() * len(self) + images)  # faster than np.unique
        texts, images = divmod(pairs[np.diff(pairs, prepend=-1) > 0], len(self))
        return starts_of(np.bincount(texts, minlength=len(self.text))), images

    @cached_property
    def _captions_of(self) -> tuple[np.ndarray, np.ndarray]:
        """The captions that are text i of `text_ids`, as in `_images_of`."""
        ids = self.text_ids.numpy()
        return starts_of(np.bincount(ids, minlength=len(ids))), ids.argsort(kind="stable")

    @property
    def img_to_txt(self) -> Mapping[int, list[int]]:
        return Computed(len(self), self._positives_of_image)

    @property
    def txt_to_img(self) -> Mapping[int, int | list[int]]:
        return Computed(len(self.text), self._positives_of_caption)

    def _positives_of_image(self, image: int) -> list[int]:
        texts = np.unique(self.text_ids[self._own_captions(image)].numpy())
        starts, captions = self._captions_of
        return np.sort(captions[ranges(starts[texts], starts[texts + 1] - starts[texts])]).tolist()

    def _positives_of_caption(self, caption: int) -> int | list[int]:
        starts, images = self._images_of
        text = self.text_ids[caption]
        found = images[starts[text] : starts[text + 1]].tolist()
        return found if len(found) > 1 else found[0]

    def cache(
        self,
        folder: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        """Decode all images once, by `decode_once`; `batches` then reads the cached pixels. Raises
        `InputError`, also if there is a `transform`."""
        if self.transform is not None:
            raise InputError("the cache holds images as CLIP resizes them: it takes no transform")
        name = f"{self.root.resolve().name}_{self.split}"
        self.cached, self.unreadable = decode_once(self, name, folder, device, num_workers)

    def batches(self, batches: list[list[int]], num_workers: int) -> Iterator[Tensor]:
        """Batches `[n, 3, r, r]` for lists of image indices. Raises `InputError` for an unreadable
        image."""
        if self.cached is None:
            yield from (loaded.images for loaded in read_batches(self.reader, batches, num_workers))
            return
        for problem in self.unreadable.values():
            raise InputError(problem)
        if self.cached_rows is not None:
            batches = [self.cached_rows[rows].tolist() for rows in batches]
        yield from gather(self.cached, batches)

    def fingerprint(self) -> str:
        """A digest of the images' names, the captions and their order."""
        digest = hashlib.sha256()
        for strings in (self.names, self.text):
            digest.update(strings.data)
            digest.update(strings.starts)
        digest.update(self.starts)
        return digest.hexdigest()

    def count_cut_captions(self) -> int:
        """The number of captions longer than the text tower's context; of very many captions, an
        estimate from a sample."""
        captions = self.tokens.sample
        return int(captions.is_cut.sum()) * len(self.text) // max(1, len(captions))

    def count_alike_captions(self) -> int:
        """The number of captions that equal a different text after cutting."""
        captions = self.tokens
        if not captions.sample.is_cut.any():
            return 0
        if captions.is_lazy:  # a token has a byte or more
            bytes_left = self.context_length - 2
            captions = captions.of(np.flatnonzero(np.diff(self.text.starts) >= bytes_left))
        texts: dict[bytes, list[int]] = {}
        for caption in np.flatnonzero(captions.lengths >= self.context_length).tolist():
            text = int(captions.first_equal[caption])
            texts.setdefault(captions[caption].numpy().tobytes(), []).append(text)
        return sum(len(alike) for alike in texts.values() if len(set(alike)) > 1)

    def share_of_fragments(self) -> float:
        """The share of the captions' tokens that are parts of words, or unknown; an estimate like
        `count_cut_captions`."""
        captions = self.tokens.sample
        counts = captions.counts(self.tokenizer.words.stop)
        counts[self.tokenizer.padding] = 0
        of_words = counts.sum() - 2 * len(captions)  # without start and end
        return float(counts[self.tokenizer.fragments].sum() / max(1, of_words))

    def count_shared_captions(self) -> int:
        """The number of captions that are positives of several images."""
        return int((np.diff(self._images_of[0])[self.text_ids.numpy()] > 1).sum())

    def _check_images_exist(self) -> np.ndarray | None:
        """The places of images in containers. Raises `InputError` for missing images; in training,
        where others take their place, only if all are missing."""
        missing, places = locate(self.root, self.names)
        if missing and (self.split != "train" or len(missing) == len(self.image)):
            raise InputError(
                f"{self.root}: {len(missing)} of the {len(self.image)} {self.split} images are "
                f"missing, the first is {why_missing(self.root / missing[0])}; put them there or "
                "remove their entries"
            )
        return places


class Batch(NamedTuple):
    """One process's part of a training batch: n images and k captions of each. The features of the
    towers in `cached`, float32, take the place of inputs: `[n, d]` as images, `[n * k, d]` as
    tokens."""

    images: Tensor  # `[n, 3, r, r]`, uint8, on the device
    crops: Tensor | None  # `[n, 3]` of `draw_crops`, or None for whole images
    tokens: Tensor  # `[n * k, context_length]` on the CPU, image by image
    texts: Tensor | None = None  # `[n, m]`, for `contrastive_loss`
    colours: Tensor | None = None  # `[n, 3, 4]` of `draw_recolourings`, on the device
    # The inputs of distillation, if this process has some: every other image of all processes'
    # batch, with changed colours and words, or in their places what is `Unlabelled`.
    altered: "Batch | None" = None
    cached: frozenset[str] = frozenset()  # "image", "text"

    def split(self, size: int) -> list["Batch"]:
        """The batch in parts of at most `size` images, without `altered`."""
        k = len(self.tokens) // len(self.images)
        images = self.images.split(size)
        crops, texts, colours = (
            [None] * len(images) if rows is None else rows.split(size)
            for rows in (self.crops, self.texts, self.colours)
        )
        parts = zip(images, crops, self.tokens.split(size * k), texts, colours, strict=True)
        return [Batch(*part, cached=self.cached) for part in parts]

    def augmented_images(self, preprocess: Preprocess) -> Tensor:
        """`[n, 3, r, r]`, normalised, cropped and recoloured."""
        images = preprocess.normalize(self.images)
        if self.crops is not None:
            images = crop(images, self.crops)
        return images if self.colours is None else recolour(images, self.colours)


def check_batch_size(batch_size: int, images: int, processes: Processes) -> None:
    """Raise `InputError` for a batch that the training set or the processes cannot fill."""
    if images < 2:
        raise InputError(f"training needs at least 2 images, and there is {images}")
    if images < batch_size:
        raise InputError(
            f"--batch_size {batch_size} is more than the {images} training images: give "
            f"--batch_size {images} or less"
        )
    if batch_size < processes.size:
        raise InputError(f"--batch_size {batch_size} is less than the {processes.size} processes")


@dataclass(eq=False)
class TrainLoader:
    """Shuffled batches of images with `captions_per_image` of their captions (at most as many as
    any image has). Random choices follow from the seed and the epoch alone. Images after the last
    whole batch sit out the epoch. With `alter`, batches have the inputs of distillation; images and
    sentences that are `unlabelled` take the place of altered ones.

    An unreadable image is reported once, and another takes its place; with `strict` it is an
    `InputError`.
    """

    dataset: Flickr8kDataset
    batch_size: int
    device: torch.device
    seed: int = 0
    num_workers: int = 0
    augment: bool = True
    captions_per_image: int = 1
    strict: bool = False
    processes: Processes = ALONE
    alter: bool = False
    unlabelled: Unlabelled = field(default_factory=Unlabelled)

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.dataset), self.processes)
        self.most = int(np.diff(self.dataset.starts).max())  # captions of an image
        self.captions_per_image = min(self.captions_per_image, self.most)
        self.reported: set[str] = set()
        self.features: dict[str, Tensor] = {}  # cached, of frozen towers; see `cache_features`
        tokenizer, length = self.dataset.tokenizer, self.dataset.context_length
        self.sentences = TokenizedTexts(tokenizer, self.unlabelled.texts, length)

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of the epoch's batches, from the `start`-th on."""
        numbers = np.random.PCG64((self.seed, epoch))
        random = np.random.Generator(numbers)
        order = random.permutation(len(self.dataset))
        batches = order[: len(self) * self.batch_size].reshape(len(self), -1)[start:]
        of_captions = numbers.state
        numbers.advance(len(self.dataset) * self.most)
        crops = draw_crops(len(self.dataset), random)
        texts = self.features.get("text", self.dataset.tokens)
        others = self._load_unlabelled(random, start)
        for step, loaded in enumerate(self._load(batches), start):
            self._report(loaded.problems)
            captions = self._draw_captions(loaded.rows, of_captions)
            batch = Batch(
                upload(loaded.images, self.device),
                upload(crops[loaded.rows], self.device) if self.augment else None,
                texts[captions[:, : self.captions_per_image].flatten()],
                self.dataset.text_ids[captions],
                cached=frozenset(self.features),
            )
            altered = self._altered(batch, (self.seed, epoch, step), others)
            yield batch._replace(altered=altered)

    def _altered(
        self, batch: Batch, seed: tuple[int, int, int], others: Iterator[Loaded]
    ) -> Batch | None:
        """The inputs of distillation, if any; unlabelled images are the next of `others`. Random
        numbers are drawn for the whole batch, so that they do not depend on the number of
        processes."""
        shard = self.processes.shard(self.batch_size)
        local, in_shard = slice(shard.start % 2, None, 2), slice(shard.start, shard.stop)
        images = batch.images[local]
        if not (self.alter and len(images)):
            return None
        random, cached = np.random.default_rng(seed), batch.cached
        colours = draw_recolourings(self.batch_size, random)[in_shard][local]
        tokens = batch.tokens.unflatten(0, (len(batch.images), -1))[local].flatten(0, 1)
        k, length = self.captions_per_image, tokens.shape[1]
        if len(self.sentences):
            rows = random.integers(len(self.sentences), size=(self.batch_size, k))
            tokens = self.sentences[rows[in_shard][local].flatten()]
            cached -= {"text"}
        elif "text" not in cached:
            draws = torch.from_numpy(random.random((self.batch_size, k, 2 * length + 1)))
            draws = draws[in_shard][local].flatten(0, 1)
            tokenizer = self.dataset.tokenizer
            tokens = reword(tokens, draws, tokenizer.words, tokenizer.padding)
        crops = None if batch.crops is None else batch.crops[local]
        if self.unlabelled.images:
            other = next(others)
            self._report(other.problems)
            images, cached = upload(other.images, self.device), cached - {"image"}
            return Batch(images, crops, tokens, cached=cached)
        return Batch(images, crops, tokens, colours=upload(colours, self.device), cached=cached)

    def _load_unlabelled(self, random: np.random.Generator, start: int) -> Iterator[Loaded]:
        """This process's unlabelled images for each step of an epoch, from the `start`-th on: as
        many as `_altered` has of the batch."""
        paths, shard = self.unlabelled.images, self.processes.shard(self.batch_size)
        if not (self.alter and paths):
            return iter(())
        rows = random.integers(len(paths), size=(len(self), self.batch_size))[start:].tolist()
        part = slice(shard.start + shard.start % 2, shard.stop, 2)
        reader = ImageReader(paths, self.dataset.preprocess.resize_and_crop)
        return read_batches(reader, rows, self.num_workers, part, substitute=True)

    def _load(self, batches: np.ndarray) -> Iterator[Loaded]:
        shard = self.processes.shard(self.batch_size)
        part = slice(shard.start, shard.stop)
        cached = self.features.get("image", self.dataset.cached)
        unreadable = self.dataset.unreadable
        if cached is None:
            rows = (batch.tolist() for batch in batches)
            return read_batches(
                self.dataset.reader, rows, self.num_workers, part, substitute=not self.strict
            )
        for problem in unreadable.values() if self.strict else ():
            raise InputError(problem)
        rows = [self._readable(batch, part) for batch in batches.tolist()]
        return map(Loaded, gather(cached, rows), rows, repeat(unreadable))

    def _readable(self, batch: list[int], part: slice) -> list[int]:
        rows: list[int] = []
        for row in batch[part]:
            candidates = substitutes(row, len(self.dataset), batch, rows)
            rows.append(next(r for r in candidates if r not in self.dataset.unreadable))
        return rows

    def _report(self, problems: dict[int, str]) -> None:
        """Print the problems of images that were not reported yet."""
        for problem in set(problems.values()) - self.reported:
            self._print(f"{problem}; another image takes its place")
        self.reported.update(problems.values())

    def _print(self, line: str) -> None:
        tqdm.write(line, file=None if self.processes.is_rank_0 else sys.stderr)

    def _draw_captions(self, rows: list[int], numbers: dict[str, Any]) -> Tensor:
        """The caption indices of these images in random order, `[n, most]`; images with fewer than
        the `most` captions repeat theirs from the first on. Image i is drawn by the random numbers
        from i * most on after those of the state `numbers`: a row costs as much as it has captions,
        and not the whole set as much as the image with the most."""
        source, at = np.random.PCG64(), 0
        source.state = numbers
        drawn = np.empty((len(rows), self.most))
        for place in np.argsort(rows):
            source.advance(rows[place] * self.most - at)
            drawn[place] = np.random.Generator(source).random(self.most)
            at = (rows[place] + 1) * self.most
        first, count = self.dataset.starts[rows], np.diff(self.dataset.starts)[rows]
        drawn[np.arange(self.most) >= count[:, None]] = 2  # missing captions are sorted last
        nth = np.arange(self.most) % count[:, None]
        return torch.from_numpy(first[:, None] + np.take_along_axis(drawn.argsort(), nth, axis=1))


@dataclass(eq=False)
class StreamLoader(TrainLoader):
    """Batches of streamed samples, shuffled by the seed and the epoch; see `StreamedParts`. Broken
    ones are left out and counted.

    Each sample comes once an epoch, but for those after the last whole batch, if processes divide
    the batch, processes times workers the shards, shards are of one size, and no sample is broken.
    Otherwise some come twice and others not. A resumed epoch goes on after as many samples: the
    same ones if processes and workers are as many as before, and no sample was broken.
    """

    dataset: Stream

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.dataset.shards) < self.processes.size:
            raise InputError(
                f"--stream: {len(self.dataset.shards)} shards are fewer than the "
                f"{self.processes.size} processes, of which each reads its own"
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        dataset, shard = self.dataset, self.processes.shard(self.batch_size)
        others = self._load_unlabelled(np.random.default_rng((self.seed, epoch, 0, 2)), start)
        of_a_process = len(dataset.shards) // self.processes.size
        workers = min(self.num_workers, of_a_process, len(shard))
        parts = read_in_workers(
            StreamedParts(
                dataset.shards, dataset.preprocess.resize_and_crop, (self.seed, epoch),
                self.processes[:2], rows=len(shard), batches=range(start, len(self)),
            ),
            workers,
        )  # fmt: skip
        left_out: list[str] = []
        for step, of_batch in enumerate(zip(*[parts] * max(1, workers), strict=True), start):
            images, captions, problems = zip(*of_batch, strict=True)
            left_out.extend(chain(*problems))
            texts = [*chain(*captions)]
            tokens = TokenizedTexts(dataset.tokenizer, texts, dataset.context_length)[:]
            random = np.random.default_rng((self.seed, epoch, step, 1))
            crops = draw_crops(self.batch_size, random)[shard.start : shard.stop]
            batch = Batch(
                upload(torch.cat(images), self.device),
                upload(crops, self.device) if self.augment else None,
                tokens,
                # Not random between processes, as the hashes of strings are.
                torch.tensor([[hash(tuple(text))] for text in tokens.tolist()]),
            )
            altered = self._altered(batch, (self.seed, epoch, step), others)
            yield batch._replace(altered=altered)
        if left_out:
            self._print(f"samples of the stream that cannot be read: {len(left_out)}; the first: "
                        f"{left_out[0]}")  # fmt: skip
