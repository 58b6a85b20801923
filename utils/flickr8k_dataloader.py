"""Captioned images: the data set, and the batches to train on."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, repeat
from pathlib import Path
from typing import NamedTuple

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
from models.tokens import clip_tokenizer, fitting, token_rows
from utils.data.annotations import (
    SPLITS,
    caption_file,
    join_parts,
    read_annotations,
    why_missing,
)
from utils.data.augment import crop, draw_crops, draw_recolourings, recolour, reword
from utils.data.image_cache import decode_once, gather
from utils.data.image_reading import ImageReader, Loaded, read_batches, substitutes
from utils.data.unlabelled import Unlabelled
from utils.machine.processes import ALONE, Processes

ALIKE = (  # the end of a warning
    "equal as far as the model reads them, so that it cannot tell them apart: shorten how they "
    "start, or take a model with a longer context"
)


class Flickr8kDataset(Dataset):
    """Images and their captions, from `{language}_{split}.json` (or .jsonl, .csv, .tsv) in
    `root_dir`; with several languages the captions in all of them.

    `split` is "train" (the default), "val" or "test"; `is_train` also chooses between the first
    two. `dataset[i]` is (image, captions): uint8 pixels `[3, target_shape, target_shape]`, resized
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
        is_train: bool | None = None,
        transform: Callable[[Image.Image], Tensor] | None = None,
        plain_protocol: bool = False,
        model: CLIP | None = None,
        split: str | None = None,
    ):
        root = Path(root_dir).expanduser()
        self.root = root
        self.split = _split(split, is_train)
        self.preprocess = Preprocess(target_shape)
        self.tokenizer = clip_tokenizer()
        self.context_length = CONTEXT_LENGTH
        if model:
            self.prepare_for(model)
        self.transform = transform
        self.plain_protocol = plain_protocol
        self.cached: Tensor | None = None
        self.unreadable: dict[int, str] = {}  # {image index: problem}, found by `cache`
        languages = dict.fromkeys([language] if isinstance(language, str) else language)
        files = [caption_file(root, name, self.split) for name in languages]
        captions_of = dict(join_parts(map(read_annotations, files)))
        self.names = [*captions_of]  # of the images: their paths below the root, with slashes
        self.image = [str(root / name) for name in self.names]
        self.text: list[str] = []
        self.own_captions: dict[int, list[int]] = {}
        for i, captions in enumerate(captions_of.values()):
            self.own_captions[i] = list(range(len(self.text), len(self.text) + len(captions)))
            self.text += captions
        self._check_images_exist()

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        captions = [self.text[caption] for caption in self.own_captions[index]]
        return self.reader[index], captions

    @property
    def reader(self) -> ImageReader:
        return ImageReader(self.image, self.transform or self.preprocess.resize_and_crop)

    def prepare_for(self, model: CLIP) -> None:
        """Prepare images and captions for `model`; to be called before either is used."""
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.context_length = model.context_length

    @cached_property
    def tokens(self) -> Tensor:
        """All captions as IntTensor `[captions, context_length]`; long ones are cut."""
        return token_rows(self.tokenizer, self.text, self.context_length, truncate=True)

    @cached_property
    def full(self) -> dict[int, tuple[int, ...]]:
        """{caption index: all its tokens, uncut}, for captions that fill their row of `tokens`."""
        # In the last place but one: the last may hold the end of the text, which can be padding.
        full = (self.tokens[:, -2] != self.tokenizer.padding).nonzero().flatten().tolist()
        return {caption: tuple(self.tokenizer.encode(self.text[caption])) for caption in full}

    @cached_property
    def text_ids(self) -> Tensor:
        """For each caption the index of the first caption that is the same text, `[captions]`."""
        if self.plain_protocol:
            return torch.arange(len(self.text))
        first: dict[object, int] = {}
        rows = enumerate(self.tokens.numpy())
        texts = ((caption, self.full.get(caption, row.tobytes())) for caption, row in rows)
        return torch.tensor([first.setdefault(text, caption) for caption, text in texts])

    @cached_property
    def _images_of(self) -> dict[int, list[int]]:
        """{text of `text_ids`: the images that have it}."""
        ids = self.text_ids.tolist()
        images_of: dict[int, list[int]] = {}
        for image, captions in self.own_captions.items():
            for text in {ids[caption] for caption in captions}:
                images_of.setdefault(text, []).append(image)
        return images_of

    @cached_property
    def img_to_txt(self) -> dict[int, list[int]]:
        positives: dict[int, list[int]] = {image: [] for image in self.own_captions}
        for caption, text in enumerate(self.text_ids.tolist()):
            for image in self._images_of[text]:
                positives[image].append(caption)
        return positives

    @cached_property
    def txt_to_img(self) -> dict[int, int | list[int]]:
        images = {text: im if len(im) > 1 else im[0] for text, im in self._images_of.items()}
        return {caption: images[text] for caption, text in enumerate(self.text_ids.tolist())}

    def subset(self, images: Sequence[int]) -> "Flickr8kDataset":
        """A data set of these images alone."""
        part, captions = copy(self), [self.own_captions[image] for image in images]
        for name in ("full", "text_ids", "_images_of", "img_to_txt", "txt_to_img"):
            vars(part).pop(name, None)
        part.names, part.image = [self.names[i] for i in images], [self.image[i] for i in images]
        part.text = [self.text[caption] for own in captions for caption in own]
        part.tokens = self.tokens[list(chain.from_iterable(captions))]
        numbers = iter(range(len(part.text)))
        part.own_captions = {i: list(islice(numbers, len(own))) for i, own in enumerate(captions)}
        part.cached = None if self.cached is None else self.cached[list(images)]
        part.unreadable = {
            i: self.unreadable[image] for i, image in enumerate(images) if image in self.unreadable
        }
        return part

    def plain(self) -> "Flickr8kDataset":
        """The same data set with `plain_protocol`."""
        part = self.subset(range(len(self)))
        part.plain_protocol = True
        return part

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
        yield from gather(self.cached, batches)

    def fingerprint(self) -> str:
        """A digest of the images' names, the captions and their order."""
        image_of = [i for i, captions in self.own_captions.items() for _ in captions]
        content = json.dumps([self.names, image_of, self.text])
        return hashlib.sha256(content.encode()).hexdigest()

    def count_cut_captions(self) -> int:
        """The number of captions longer than the text tower's context."""
        fits = fitting(self.tokenizer, self.context_length)
        return sum(len(tokens) > fits for tokens in self.full.values())

    def count_alike_captions(self) -> int:
        """The number of captions that equal a different text after cutting."""
        texts: dict[bytes, list[tuple[int, ...]]] = {}
        for caption, tokens in self.full.items():
            texts.setdefault(self.tokens[caption].numpy().tobytes(), []).append(tokens)
        return sum(len(alike) for alike in texts.values() if len(set(alike)) > 1)

    def check_texts(self) -> None:
        """Raise `InputError` if all captions have the same tokens."""
        if (self.tokens == self.tokens[0]).all():
            raise InputError(
                f"{self.root}: all {len(self.text)} {SPLITS[self.split]} captions are one text to "
                f"the model, {self.text[0]:.60}...; captions should tell images apart within the "
                f"first {self.context_length} tokens"
            )

    def share_of_fragments(self) -> float:
        """The share of the captions' tokens that are parts of words, or unknown."""
        tokens = self.tokens[self.tokens > 0]  # without padding
        fragments = torch.tensor(self.tokenizer.fragments, dtype=tokens.dtype)
        of_words = len(tokens) - 2 * len(self.text)  # without start and end
        return torch.isin(tokens, fragments).sum().item() / max(1, of_words)

    def count_shared_captions(self) -> int:
        """The number of captions that are positives of several images."""
        return sum(isinstance(images, list) for images in self.txt_to_img.values())

    def _check_images_exist(self) -> None:
        """Raise `InputError` for missing images; in training, where others take their place, only
        if all are missing."""
        missing = [image for image in self.image if not Path(image).is_file()]
        if missing and (self.split != "train" or len(missing) == len(self.image)):
            raise InputError(
                f"{self.root}: {len(missing)} of the {len(self.image)} {self.split} images are "
                f"missing, the first is {why_missing(Path(missing[0]))}; put them there or remove "
                "their entries"
            )


def _split(split: str | None, is_train: bool | None) -> str:
    """The split that both arguments choose; `InputError` if they contradict each other."""
    if split is None:
        return "train" if is_train is None or is_train else "val"
    if split not in SPLITS:
        raise InputError(f"split {split!r:.60}: unknown; the splits are {', '.join(SPLITS)}")
    if is_train is not None and bool(is_train) != (split == "train"):
        raise InputError(f"split {split!r} and is_train={is_train}: give one of them")
    return split


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
        most = max(map(len, self.dataset.own_captions.values()))
        self.captions_per_image = min(self.captions_per_image, most)
        self.reported: set[str] = set()
        self.features: dict[str, Tensor] = {}  # cached, of frozen towers; see `cache_features`
        tokenizer, length = self.dataset.tokenizer, self.dataset.context_length
        self.sentences = token_rows(tokenizer, self.unlabelled.texts, length, truncate=True)

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This process's part of the epoch's batches, from the `start`-th on."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        batches = order[: len(self) * self.batch_size].reshape(len(self), -1)[start:].tolist()
        captions = self._draw_captions(random)
        crops = draw_crops(len(self.dataset), random)
        texts = self.features.get("text", self.dataset.tokens)
        others = self._load_unlabelled(random, start)
        for step, loaded in enumerate(self._load(batches), start):
            self._report(loaded.problems)
            batch = Batch(
                upload(loaded.images, self.device),
                upload(crops[loaded.rows], self.device) if self.augment else None,
                texts[captions[loaded.rows, : self.captions_per_image].flatten()],
                self.dataset.text_ids[captions[loaded.rows]],
                cached=frozenset(self.features),
            )
            altered = self._altered(batch, (self.seed, epoch, step)) if self.alter else None
            if altered and self.unlabelled.images:
                other = next(others)
                self._report(other.problems)
                images, cached = upload(other.images, self.device), altered.cached - {"image"}
                altered = altered._replace(images=images, colours=None, cached=cached)
            yield batch._replace(altered=altered)

    def _altered(self, batch: Batch, seed: tuple[int, int, int]) -> Batch | None:
        """The inputs of distillation, but for unlabelled images. Random numbers are drawn for the
        whole batch, so that they do not depend on the number of processes."""
        shard = self.processes.shard(self.batch_size)
        local, in_shard = slice(shard.start % 2, None, 2), slice(shard.start, shard.stop)
        images = batch.images[local]
        if not len(images):
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

    def _load(self, batches: list[list[int]]) -> Iterator[Loaded]:
        shard = self.processes.shard(self.batch_size)
        part = slice(shard.start, shard.stop)
        cached = self.features.get("image", self.dataset.cached)
        unreadable = self.dataset.unreadable
        if cached is None:
            reader = self.dataset.reader
            return read_batches(reader, batches, self.num_workers, part, not self.strict)
        for problem in unreadable.values() if self.strict else ():
            raise InputError(problem)
        rows = [self._readable(batch, part) for batch in batches]
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
            console = None if self.processes.is_rank_0 else sys.stderr
            tqdm.write(f"{problem}; another image takes its place", file=console)
        self.reported.update(problems.values())

    def _draw_captions(self, random: np.random.Generator) -> Tensor:
        """The caption indices of each image in random order, `[n, most]`; images with fewer than
        the `most` captions repeat theirs from the first on."""
        captions = self.dataset.own_captions.values()
        first, count = np.array([(own[0], len(own)) for own in captions]).T
        drawn = random.random((len(count), count.max()))
        drawn[np.arange(count.max()) >= count[:, None]] = 2  # missing captions are sorted last
        nth = np.arange(count.max()) % count[:, None]
        return torch.from_numpy(first[:, None] + np.take_along_axis(drawn.argsort(), nth, axis=1))
