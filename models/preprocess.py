"""CLIP's image preprocessing, the same in training, evaluation and prediction.

Two stages: `pixels` (resize, crop: once an image) makes uint8, `normalize` (mean and standard
deviation) runs batched, on whatever device the pixels are.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import describe, one_line

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RUN_BY_OTHERS = {"EPS", "WMF"}  # Pillow has Ghostscript, or Windows, carry out what such files say
STRIP = 100  # an image this many times longer than wide is never enlarged as a whole


def open_image(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, decoded, upright, in RGB; the first frame of an animation.

    Raises `InputError` that names the file, on one line, where there is no readable picture.
    """
    try:
        file = Path(path).expanduser()
        if not file.is_file():  # a pipe would be waited for, without end
            raise InputError(f"{path}: {'is no file' if file.exists() else 'no such image file'}")
        with Image.open(file) as image:
            if image.format in RUN_BY_OTHERS:
                raise InputError(
                    f"{path}: {image.format} is not read, since drawing it runs a program on it; "
                    "save it as PNG"
                )
            return upright_rgb(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: not an image that Pillow can read, but {describe(file)}"
        ) from None
    except Exception as error:  # a broken file can make Pillow's decoders raise anything
        reason = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says, in RGB.

    Transparency is dropped, as CLIP does it: the colours that it hides are seen. 16-bit grey keeps
    its upper 8 bits.
    """
    image.load()  # a broken picture raises here, so what the next lines pass over is broken EXIF
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would make all above 255 white
        grey = np.asarray(image) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # straight to RGB, Pillow warns about some palettes
        image = image.convert("RGBA")
    return image.convert("RGB")


def pixels(image: Image.Image, side: int) -> Tensor:
    """An RGB image -> uint8 `[3, side, side]`: its short side resized bicubically, its centre cut
    out, pixel for pixel as torchvision's `Resize` and `CenterCrop` do it."""
    short, long = min(image.size), max(image.size)
    enlarged = int(side * long / short)
    width, height = (side, enlarged) if image.width == short else (enlarged, side)
    left, top = round((width - side) / 2), round((height - side) / 2)
    box = (left, top, left + side, top + side)
    if long <= STRIP * short:
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
    else:  # the same up to rounding, without the memory for what is cut off
        x, y = image.width / width, image.height / height
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 `[..., 3, r, r]` -> float32, each channel less its mean, by its standard deviation.

    Floats are returned as they are: a transform of the user's own has normalised them.
    """
    if images.is_floating_point():
        return images
    mean, std = _mean_and_std(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once a device: copying numbers to a GPU waits for all that it is doing."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


@dataclass(frozen=True)
class Preprocess:
    """An image of any size and mode -> what a model of resolution `side` reads, float32
    `[3, side, side]`."""

    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(pixels(upright_rgb(image), self.side))
