"""CLIP's image preprocessing, the same in training, evaluation and prediction.

It has two stages. `pixels` resizes and crops one image and gives uint8. `normalize` subtracts the
mean and divides by the standard deviation; it takes a whole batch, on the CPU or on a GPU.
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

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, from 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)
# Formats that Pillow draws by starting another program (Ghostscript for EPS, Windows for WMF), so
# that a picture from a stranger could run code.
DRAWN_BY_PROGRAMS = {"EPS", "WMF"}
# Long side over short side. A narrower image is not resized whole: that could fill the memory.
MAX_ASPECT_RATIO = 100


def open_image(path: str | os.PathLike) -> Image.Image:
    """The picture in a file, upright and in RGB; of an animation, the first frame.

    Raises `InputError`, with one line that names the file, if it holds no readable picture.
    """
    try:
        file = Path(path).expanduser()
        if not file.is_file():  # opening a pipe could wait for ever
            raise InputError(f"{path}: {'is no file' if file.exists() else 'no such image file'}")
        with Image.open(file) as image:
            if image.format in DRAWN_BY_PROGRAMS:
                raise InputError(
                    f"{path}: {image.format} is not read: another program would draw it, and could "
                    "run code that is in the file; save it as PNG"
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
    """The image in RGB, turned upright as its EXIF data says.

    Transparency is dropped, as in the original CLIP: transparent pixels show the colour stored for
    them. 16-bit grey keeps its upper 8 bits. Raises whatever Pillow raises for a broken picture.
    """
    image.load()  # a broken picture raises here, so only broken EXIF data is passed over below
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion turns all values above 255 white
        grey = np.asarray(image) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # without this step Pillow warns about some palettes
        image = image.convert("RGBA")
    return image.convert("RGB")


def pixels(image: Image.Image, side: int) -> Tensor:
    """An RGB image -> uint8 `[3, side, side]`, `side` in pixels.

    The image is resized (bicubic) until its short side fits, and the square in its centre is cut
    out: pixel for pixel what torchvision's `Resize` and `CenterCrop` give. In an image beyond
    `MAX_ASPECT_RATIO`, values may differ from theirs by rounding.
    """
    short, long = min(image.size), max(image.size)
    enlarged = int(side * long / short)
    width, height = (side, enlarged) if image.width == short else (enlarged, side)
    left, top = round((width - side) / 2), round((height - side) / 2)
    box = (left, top, left + side, top + side)
    if long <= MAX_ASPECT_RATIO * short:
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
    else:  # resize only the part that is kept
        x, y = image.width / width, image.height / height
        box = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
        image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """uint8 `[..., 3, r, r]` -> float32 of the same shape: scaled to 0 to 1, minus the mean of its
    channel, divided by the standard deviation.

    Floats are returned unchanged: they come from a transform of the user's own, which has
    normalised them already.
    """
    if images.is_floating_point():
        return images
    mean, std = _mean_and_std(images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as float32 `[3, 1, 1]`. They are kept for each device, because a copy to a GPU waits
    until it has done everything else."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


@dataclass(frozen=True)
class Preprocess:
    """An image of any size and mode -> float32 `[3, side, side]`, for a model whose image
    resolution is `side` pixels."""

    side: int

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(pixels(upright_rgb(image), self.side))
