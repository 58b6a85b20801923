"""Reading of image files, and CLIP's preprocessing: `resize_and_crop` gives the uint8 pixels of one
image, `normalize` the input of the model for a batch, on any device."""

import io
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.config import OPENAI_MEAN, OPENAI_STD, Colour
from models.errors import InputError, one_line
from models.files import describe, probably_meant

# Formats that Pillow reads by another program (Ghostscript, Windows), which could run code in them.
DRAWN_BY_PROGRAMS = {"EPS", "WMF"}
# Photograph formats that Pillow may lack, by the files' endings: the remedy.
NEED_A_PACKAGE = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif"),
    ".avif": "pip install --upgrade Pillow",
}

with suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()


def open_image(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
    """The image in a file, or the first frame of an animation, upright and in RGB; or `InputError`.
    `content` is what the file at `path`, if it is part of another one, holds."""
    try:
        file = Path(path).expanduser()
        if content is None and not file.is_file():
            beside = (other.name for other in file.parent.glob("*") if other.is_file())
            raise InputError(f"{path}: no such image file{probably_meant(file.name, beside)}")
        with Image.open(file if content is None else io.BytesIO(content)) as image:
            if image.format in DRAWN_BY_PROGRAMS:
                raise InputError(f"{path}: {image.format} is not read: another program would draw "
                                 "it, and could run code in it; save it as PNG")  # fmt: skip
            return upright_rgb(image)
    except InputError:
        raise
    except UnidentifiedImageError:
        what = f"but {describe(file) if content is None else f'{len(content):,} other bytes'}"
        if package := NEED_A_PACKAGE.get(file.suffix.lower()):
            what = f"which may lack its format: {package}, or save it as JPEG"
        raise InputError(f"{path}: not an image that Pillow can read, {what}") from None
    except Exception as error:  # a broken file can make Pillow's decoders raise anything
        reason = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, upright by its EXIF data. Transparency is dropped, as in the original CLIP;
    grey of more than 8 bits is scaled. Raises Pillow's errors for a broken image."""
    image.load()  # a broken image raises here, so that only broken EXIF data is ignored below
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion cuts all values at 255
        image = _grey_of_8_bits(image)
    if "transparency" in image.info:  # without this step Pillow warns about some palettes
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of integers or floats in 8 bits. White is the largest number of the 8, 16, 24 or 32 bits
    that hold all values, or 1 for floats below 2; negative values and NaN are black."""
    values = np.nan_to_num(np.asarray(image), nan=0, posinf=np.inf, neginf=0)
    largest = values.max(where=np.isfinite(values), initial=0)
    n_bytes = max(1, -(-int(largest).bit_length() // 8))
    white = 1 if image.mode == "F" and largest < 2 else 256**n_bytes - 1
    return Image.fromarray((values / (white / 255)).clip(0, 255).round().astype(np.uint8))


def normalize(images: Tensor, mean: Colour = OPENAI_MEAN, std: Colour = OPENAI_STD) -> Tensor:
    """uint8 `[..., 3, r, r]` -> float32 of the same shape: scaled to 0 to 1, minus the mean of its
    channel, divided by the standard deviation. Floats, of a user's own transform, stay."""
    if images.is_floating_point():
        return images
    mean, std = _on_device(mean, images.device), _on_device(std, images.device)
    return images.float().div_(255).sub_(mean).div_(std)


@lru_cache
def _on_device(colour: Colour, device: torch.device) -> Tensor:
    """As float32 `[3, 1, 1]`; cached, because a copy to a GPU waits for all its work."""
    return torch.tensor(colour, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class Preprocess:
    """An image of any size and mode -> float32 `[3, side, side]`, for a model whose image
    resolution is `side` pixels. The other fields are those of `Config`."""

    side: int
    mean: Colour = OPENAI_MEAN
    std: Colour = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def resize_and_crop(self, image: Image.Image) -> Tensor:
        """An RGB image -> uint8 `[3, side, side]`. Mode "shortest" resizes the short side and crops
        the centre, as torchvision's `Resize` and `CenterCrop` do; "squash" resizes both sides."""
        side, width, height = self.side, self.side, self.side
        if self.resize_mode == "shortest":
            width, height = (int(side * length / min(image.size)) for length in image.size)
        left, top = round((width - side) / 2), round((height - side) / 2)
        image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        image = image.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `[..., 3, side, side]` -> float32 of the same shape."""
        return normalize(images, self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalize(self.resize_and_crop(upright_rgb(image)))
