"""Captioned images: the data set and the batches that training takes from it."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, repeat
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
from models.tokens import clip_tokenizer, token_rows
from utils.data.annotations import SPLITS, caption_file, read_annotations, why_missing
from utils.data.augment import crop, draw_crops, draw_recolourings, recolour, reword
from utils.data.image_cache import decode_once, gather
from utils.data.image_reading import ImageReader, Loaded, read_batches, substitutes
from utils.machine.processes import ALONE, Processes

ALIKE = (
    "the same as far as the model reads them, so that it cannot tell them apart: shorten what they "
    "start with, or take a model with a longer context"
)


class Flickr8kDataset(Dataset):
    """Images and their captions, from `{language}_{split}.json` (or .jsonl, .csv, .tsv) in
    `root_dir`. With several languages an image has its captions in all of them.

    `split` is "train", "val" or "test"; without it, `is_train` chooses between the first two, and
    training is the default. Both together have to agree.

    `dataset[i]` is (image, captions). The image is uint8 pixels `[3, target_shape, target_shape]`,
    resized and cropped as CLIP does it, or what `transform` makes of the PIL image; the captions
    are strings. With a `model`, images and captions are prepared as it takes them (`prepare_for`).
    Raises `InputError` for caption files that cannot be used and for missing images.

    Captions that are the same to the tokenizer are one text, which is right for every image that
    has it; those that are the same only as far as the model reads them are not. With
    `plain_protocol` a caption is right for its own image alone.

    image         paths of the image files
    text          all captions, image by image
    own_captions  {image index: [indices of its captions]}
    img_to_txt    {image index: [indices of all captions that are right for it]}
    txt_to_img    {caption index: index of the image that it is right for, or a list of several}
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
        self.unreadable: dict[int, str] = {}  # what is wrong with images, found by `cache`
        self.names: list[str] = []  # of the images: their paths below the root, with slashes
        self.image: list[str] = []
        self.text: list[str] = []
        self.own_captions: dict[int, list[int]] = {}
        captions_of: dict[str, list[str]] = {}
        for name in dict.fromkeys([language] if isinstance(language, str) else language):
            for image, captions in read_annotations(caption_file(root, name, self.split)):
                captions_of.setdefault(image, []).extend(captions)
        for i, (image, captions) in enumerate(captions_of.items()):
            self.names.append(image)
            self.image.append(str(root / image))
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
        """Prepare images and captions as `model` takes them, from now on: call it before either is
        used."""
        self.preprocess = model.preprocess
        self.tokenizer = model.tokenizer
        self.context_length = model.context_length

    @cached_property
    def tokens(self) -> Tensor:
        """All captions as IntTensor `[captions, context_length]`; those too long are cut."""
        return token_rows(self.tokenizer, self.text, self.context_length, truncate=True)

    @cached_property
    def full(self) -> dict[int, tuple[int, ...]]:
        """All tokens, also those that are cut, of the captions that leave no room in their row."""
        full = self.tokens[:, -1].nonzero().flatten().tolist()
        return {caption: tuple(self.tokenizer.encode(self.text[caption])) for caption in full}

    @cached_property
    def text_ids(self) -> Tensor:
        """For each caption the index of the first one that is the same text, `[captions]`."""
        if self.plain_protocol:
            return torch.arange(len(self.text))
        first: dict[object, int] = {}
        rows = enumerate(self.tokens.numpy())
        texts = ((caption, self.full.get(caption, row.tobytes())) for caption, row in rows)
        return torch.tensor([first.setdefault(text, caption) for caption, text in texts])

    @cached_property
    def img_to_txt(self) -> dict[int, list[int]]:
        ids = self.text_ids.tolist()
        same: dict[int, list[int]] = {}
        for caption, text in enumerate(ids):
            same.setdefault(text, []).append(caption)
        return {
            image: sorted(chain.from_iterable(same[text] for text in {ids[c] for c in captions}))
            for image, captions in self.own_captions.items()
        }

    @cached_property
    def txt_to_img(self) -> dict[int, int | list[int]]:
        ids = self.text_ids.tolist()
        having: dict[int, list[int]] = {}
        for image, captions in self.own_captions.items():
            for text in {ids[c] for c in captions}:
                having.setdefault(text, []).append(image)
        one_or_all = {text: im if len(im) > 1 else im[0] for text, im in having.items()}
        return {caption: one_or_all[text] for caption, text in enumerate(ids)}

    def cache(
        self,
        folder: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        """Decode all images into a file in `folder` (by default `.cache` in `root_dir`), which all
        runs share, and have `batches` read the pixels from there. They are kept on the device
        if they take at most a quarter of its free memory. Raises `InputError` if the file cannot be
        written.
        """
        if self.transform is not None:
            raise InputError("the cache keeps what CLIP makes of the images: it takes no transform")
        name = f"{self.root.resolve().name}_{self.split}"
        self.cached, self.unreadable = decode_once(self, name, folder, device, num_workers)

    def batches(self, batches: list[list[int]], num_workers: int) -> Iterator[Tensor]:
        """Batches of images, `[n, 3, r, r]`, for lists of image indices. Raises `InputError` for an
        image that cannot be read."""
        if self.cached is None:
            yield from (loaded.images for loaded in read_batches(self.reader, batches, num_workers))
            return
        for problem in self.unreadable.values():
            raise InputError(problem)
        yield from gather(self.cached, batches)

    def fingerprint(self) -> str:
        """A digest of the images' names, the captions and their order. It stays the same when the
        folder is moved."""
        owners = [i for i, captions in self.own_captions.items() for _ in captions]
        listed = json.dumps([self.names, owners, self.text])
        return hashlib.sha256(listed.encode()).hexdigest()

    def count_cut_captions(self) -> int:
        """How many captions are longer than the text tower reads."""
        return sum(len(tokens) + 2 > self.context_length for tokens in self.full.values())

    def count_alike_captions(self) -> int:
        """How many captions are other texts than some other, but the same once they are cut."""
        texts: dict[bytes, list[tuple[int, ...]]] = {}
        for caption, tokens in self.full.items():
            texts.setdefault(self.tokens[caption].numpy().tobytes(), []).append(tokens)
        return sum(len(alike) for alike in texts.values() if len(set(alike)) > 1)

    def check_texts(self) -> None:
        """Raise `InputError` if the model reads the same in all captions: nothing tells images
        apart then."""
        if (self.tokens == self.tokens[0]).all():
            raise InputError(
                f"{self.root}: all {len(self.text)} {SPLITS[self.split]} captions are one text to "
                f"the model, {self.text[0]:.60}...; captions should tell images apart within the "
                f"first {self.context_length} tokens"
            )

    def share_of_fragments(self) -> float:
        """The share of the captions' tokens that are parts of words, or unknown."""
        tokens = self.tokens[self.tokens > 0]  # without the zeros that fill up rows
        fragments = torch.tensor(self.tokenizer.fragments, dtype=tokens.dtype)
        of_words = len(tokens) - 2 * len(self.text)  # without those of start and end
        return torch.isin(tokens, fragments).sum().item() / max(1, of_words)

    def count_shared_captions(self) -> int:
        """How many captions are right for several images."""
        return sum(isinstance(images, list) for images in self.txt_to_img.values())

    def _check_images_exist(self) -> None:
        """Refuse a set with missing images. While training, others take their place, but some image
        must be there."""
        missing = [image for image in self.image if not Path(image).is_file()]
        if missing and (self.split != "train" or len(missing) == len(self.image)):
            raise InputError(
                f"{self.root}: {len(missing)} of the {len(self.image)} {self.split} images are "
                f"missing, the first is {why_missing(Path(missing[0]))}; put them there or remove "
                "their entries"
            )


def _split(split: str | None, is_train: bool | None) -> str:
    """The split that the arguments of a data set choose. Raises `InputError` if they contradict
    each other."""
    if split is None:
        return "train" if is_train is None or is_train else "val"
    if split not in SPLITS:
        raise InputError(f"split {split!r:.60}: no split; those are {', '.join(SPLITS)}")
    if is_train is not None and bool(is_train) != (split == "train"):
        raise InputError(f"split {split!r} and is_train={is_train}: give one of them")
    return split


class Batch(NamedTuple):
    """One process's part of a training batch: n images and k captions of each.

    images  `[n, 3, r, r]` on the device, uint8
    crops   `[n, 3]` of `draw_crops`, or None for whole images
    tokens  `[n * k, context_length]` on the CPU, image by image
    texts   `[n, m]` on the CPU, for `contrastive_loss`: `text_ids` of an image's captions, first
            of those k; or None, if no two texts are equal
    colours `[n, 3, 4]` of `draw_recolourings`, on the device, or None for the images' own
    altered every other image of the batch of all processes, as far as this one has them, in other
            colours and with captions of other words; or None

    Where a tower does not learn, its features, float32, can be in the place of its inputs:
    `[n, d]` as `images`, or `[n * k, d]` as `tokens`.
    """

    images: Tensor
    crops: Tensor | None
    tokens: Tensor
    texts: Tensor | None = None
    colours: Tensor | None = None
    altered: "Batch | None" = None

    def split(self, size: int) -> list["Batch"]:
        """The batch in parts of `size` images, without `altered`; the last may have fewer."""
        k = len(self.tokens) // len(self.images)
        images = self.images.split(size)
        crops, texts, colours = (
            [None] * len(images) if rows is None else rows.split(size)
            for rows in (self.crops, self.texts, self.colours)
        )
        parts = zip(images, crops, self.tokens.split(size * k), texts, colours, strict=True)
        return [Batch(*part) for part in parts]

    def augmented_images(self, preprocess: Preprocess) -> Tensor:
        """`[n, 3, r, r]`, normalised, cropped and in other colours."""
        images = preprocess.normalize(self.images)
        if self.crops is not None:
            images = crop(images, self.crops)
        return images if self.colours is None else recolour(images, self.colours)


def check_batch_size(batch_size: int, images: int, processes: Processes) -> None:
    """Raise `InputError` for a batch that so many training images do not fill, or that has nothing
    for some process."""
    if images < 2:
        raise InputError(f"training needs at least 2 images, and there is {images}")
    if images < batch_size:
        raise InputError(
            f"--batch_size {batch_size} is more than the {images} training images: give "
            f"--batch_size {images} or less"
        )
    if batch_size < processes.size:
        raise InputError(f"--batch_size {batch_size} is less than the {processes.size} processes")


class TrainLoader:
    """Shuffled batches of images, each with `captions_per_image` of its captions, drawn anew in
    every epoch; if no image has so many, as many as the richest has. Random choices follow from the
    seed and the epoch alone, not from the number of workers or processes, nor from what ran before.
    Images that are left over after the last whole batch sit out the epoch. With `alter` the batches
    have an `altered` one.

    An image that cannot be read is reported once, and another takes its place; with `strict` it is
    an `InputError`.
    """

    def __init__(
        self,
        dataset: Flickr8kDataset,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
        captions_per_image: int = 1,
        strict: bool = False,
        processes: Processes = ALONE,
        alter: bool = False,
    ):
        check_batch_size(batch_size, len(dataset), processes)
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.num_workers = num_workers
        self.augment = augment
        most = max(map(len, dataset.own_captions.values()))
        self.captions_per_image = min(captions_per_image, most)
        self.strict = strict
        self.processes = processes
        self.alter = alter
        self.reported: set[int] = set()
        self.features: dict[str, Tensor] = {}  # of towers that do not learn, see `cache_features`

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
        for step, loaded in enumerate(self._load(batches), start):
            self._report(loaded.problems)
            batch = Batch(
                upload(loaded.images, self.device),
                upload(crops[loaded.rows], self.device) if self.augment else None,
                texts[captions[loaded.rows, : self.captions_per_image].flatten()],
                self.dataset.text_ids[captions[loaded.rows]],
            )
            yield batch._replace(altered=self._altered(batch, (self.seed, epoch, step)))

    def _altered(self, batch: Batch, seed: tuple[int, int, int]) -> Batch | None:
        """Random numbers are drawn for the batch of all processes; this one takes its own part."""
        share = self.processes.shard(self.batch_size)
        mine, everyones = slice(share.start % 2, None, 2), slice(share.start, share.stop)
        images = batch.images[mine]
        if not (self.alter and len(images)):
            return None
        random = np.random.default_rng(seed)
        colours = draw_recolourings(self.batch_size, random)[everyones][mine]
        tokens = batch.tokens.unflatten(0, (len(batch.images), -1))[mine].flatten(0, 1)
        if not tokens.is_floating_point():
            k, length = self.captions_per_image, tokens.shape[1]
            draws = torch.from_numpy(random.random((self.batch_size, k, 2 * length + 1)))
            draws = draws[everyones][mine].flatten(0, 1)
            tokens = reword(tokens, draws, self.dataset.tokenizer.words)
        crops = None if batch.crops is None else batch.crops[mine]
        return Batch(images, crops, tokens, colours=upload(colours, self.device))

    def _load(self, batches: list[list[int]]) -> Iterator[Loaded]:
        share = self.processes.shard(self.batch_size)
        own = slice(share.start, share.stop)
        cached = self.features.get("image", self.dataset.cached)
        unreadable = self.dataset.unreadable
        if cached is None:
            return read_batches(
                self.dataset.reader, batches, self.num_workers, own, not self.strict
            )
        for problem in unreadable.values() if self.strict else ():
            raise InputError(problem)
        rows = [self._readable(batch, own) for batch in batches]
        return map(Loaded, gather(cached, rows), rows, repeat(unreadable))

    def _readable(self, batch: list[int], own: slice) -> list[int]:
        rows: list[int] = []
        for row in batch[own]:
            candidates = substitutes(row, len(self.dataset), batch, rows)
            rows.append(next(r for r in candidates if r not in self.dataset.unreadable))
        return rows

    def _report(self, problems: dict[int, str]) -> None:
        """Print what is wrong with images that were not reported yet."""
        for row in problems.keys() - self.reported:
            console = None if self.processes.is_rank_0 else sys.stderr
            tqdm.write(f"{problems[row]}; another image takes its place", file=console)
        self.reported |= problems.keys()

    def _draw_captions(self, random: np.random.Generator) -> Tensor:
        """For each image the indices of its captions in random order, `[n, most]`, from the first
        on again where an image has fewer. The first k are for training, so they are all different
        if it has k."""
        first = np.array([captions[0] for captions in self.dataset.own_captions.values()])
        count = np.array([len(captions) for captions in self.dataset.own_captions.values()])
        drawn = random.random((len(count), count.max()))
        drawn[np.arange(count.max()) >= count[:, None]] = 2  # missing captions are sorted last
        nth = np.arange(count.max()) % count[:, None]
        return torch.from_numpy(first[:, None] + np.take_along_axis(drawn.argsort(), nth, axis=1))
