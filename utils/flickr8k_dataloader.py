"""Captioned images: the data set and the batches that training takes from it."""

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.clip_utils import CONTEXT_LENGTH, tokenize, tokenizer
from models.errors import InputError
from models.preprocess import normalize, open_image, pixels
from utils.annotations import read_annotations
from utils.augment import crop, draw_crops
from utils.image_cache import cached_pixels, gather, on_device_if_small

BUILD_BATCH = 32  # images decoded at a time for the cache


class Flickr8kDataset(Dataset):
    """Images and their captions, `{language}_train.json` or `{language}_val.json` in `root_dir`.

    `dataset[i]` is (image, captions): uint8 pixels `[3, target_shape, target_shape]`, resized and
    cut as CLIP does it, or whatever `transform` makes of the PIL image; and the list of strings.

    image       paths of the image files
    text        all captions, image by image
    img_to_txt  {image index: [caption indices]}
    txt_to_img  {caption index: image index}
    """

    def __init__(
        self,
        root_dir: str | os.PathLike,
        target_shape: int = 224,
        language: str = "en",
        is_train: bool = True,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ):
        root = Path(root_dir).expanduser()
        self.root = root
        self.split = "train" if is_train else "val"
        file = root / f"{language}_{self.split}.json"
        self.target_shape = target_shape
        self.transform = transform
        self.cached: Tensor | None = None
        self.image: list[str] = []
        self.text: list[str] = []
        self.img_to_txt: dict[int, list[int]] = {}
        self.txt_to_img: dict[int, int] = {}
        for i, (image, captions) in enumerate(read_annotations(file)):
            self.image.append(str(root / image))
            self.img_to_txt[i] = list(range(len(self.text), len(self.text) + len(captions)))
            self.txt_to_img |= dict.fromkeys(self.img_to_txt[i], i)
            self.text += captions
        self._check_images_exist(file)

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        captions = [self.text[caption] for caption in self.img_to_txt[index]]
        image = open_image(self.image[index])
        if self.transform is not None:
            return self.transform(image), captions
        return pixels(image, self.target_shape), captions

    @cached_property
    def tokens(self) -> Tensor:
        """IntTensor `[captions, 77]`: every caption tokenised once; what does not fit is cut."""
        return tokenize(self.text, truncate=True)

    def cache(
        self,
        folder: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> None:
        """Have `image_batches` read pixels, decoded once, from a file in `folder` (`.cache` in
        `root_dir`), which all runs share; they live on the device where they take at most a quarter
        of its free memory. Raises `InputError` where the file cannot be written.
        """
        if self.transform is not None:
            raise InputError("the cache keeps what CLIP makes of the images: it takes no transform")
        root = self.root.resolve()
        folder = root / ".cache" if folder is None else Path(folder).expanduser()
        batches = torch.arange(len(self)).split(BUILD_BATCH)
        pixels = cached_pixels(
            folder / f"{root.name}_{self.split}_{self.target_shape}.pixels",
            self.root,
            self.image,
            self.target_shape,
            _decode(self, [rows.tolist() for rows in batches], num_workers),
        )
        self.cached = on_device_if_small(pixels, torch.device(device))

    def count_cut_captions(self) -> int:
        """How many captions are longer than the text tower reads."""
        full = self.tokens[:, -1].nonzero().flatten().tolist()
        return sum(len(tokenizer().encode(self.text[i])) + 2 > CONTEXT_LENGTH for i in full)

    def _check_images_exist(self, file: Path) -> None:
        missing = [image for image in self.image if not Path(image).is_file()]
        if missing:
            raise InputError(
                f"{file}: {len(missing)} of its {len(self.image)} images are missing, the first "
                f"is {missing[0]}; put them there or remove their entries"
            )


def image_batches(
    dataset: Flickr8kDataset, batches: list[list[int]], num_workers: int
) -> Iterator[Tensor]:
    """Batches of images, `[n, 3, r, r]`, for lists of image indices: on the CPU, or on the GPU that
    holds the cached set."""
    if dataset.cached is not None:
        return gather(dataset.cached, batches)
    return _decode(dataset, batches, num_workers)


def _decode(
    dataset: Flickr8kDataset, batches: list[list[int]], num_workers: int
) -> Iterator[Tensor]:
    loader = DataLoader(
        _Batches(dataset, batches),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # leaves the global one as it is
    )
    for images in loader:
        if isinstance(images, InputError):
            raise images
        yield images


class _Batches(Dataset):
    """Item i is the i-th batch of images, or the error that one of them brings: what a worker
    process raises would arrive with the worker's traceback in its message."""

    def __init__(self, dataset: Flickr8kDataset, batches: list[list[int]]):
        self.dataset = dataset
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | InputError:
        try:
            return torch.stack([self.dataset[row][0] for row in self.batches[index]])
        except InputError as error:
            return error


class TrainLoader:
    """Shuffled batches of (images, tokens); an image brings one of its captions, drawn anew each
    epoch. Every random choice follows from the seed and the epoch alone, so it does not depend on
    the number of workers, nor on what ran before. Images that fill no whole batch sit out an epoch.
    """

    def __init__(
        self,
        dataset: Flickr8kDataset,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        num_workers: int = 0,
        augment: bool = True,
    ):
        if len(dataset) < batch_size:
            raise InputError(
                f"--batch_size {batch_size} is more than the {len(dataset)} training images"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.device = device
        self.seed = seed
        self.num_workers = num_workers
        self.augment = augment

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images `[n, 3, r, r]` on the device, tokens `[n, 77]` on the CPU."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        batches = order[: len(self) * self.batch_size].reshape(len(self), -1)
        captions = self._draw_captions(random)[batches]
        crops = draw_crops(len(self.dataset), random)[batches].to(self.device)
        loaded = image_batches(self.dataset, batches.tolist(), self.num_workers)
        for step, images in enumerate(loaded):
            images = normalize(images.to(self.device, non_blocking=True))
            if self.augment:
                images = crop(images, crops[step])
            yield images, self.dataset.tokens[captions[step]]

    def _draw_captions(self, random: np.random.Generator) -> Tensor:
        """For each image the index of one of its captions."""
        first = np.array([captions[0] for captions in self.dataset.img_to_txt.values()])
        count = np.array([len(captions) for captions in self.dataset.img_to_txt.values()])
        return torch.from_numpy(first + random.integers(count))
