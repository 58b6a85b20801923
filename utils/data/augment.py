"""Random changes of images and captions. To train on, images are only cropped: a flip or other
colours can make a caption false ("on the left", "a red shirt"), and a crop to at least 90% of the
area leaves nearly every caption true. Colours and words change in the inputs of distillation."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_AREA = 0.9
GAIN = 0.5, 1.5  # range of a channel's factor
OFFSET = 0.3  # standard deviation of a channel's offset


def draw_crops(n: int, random: np.random.Generator) -> Tensor:
    """n random square crops `[n, 3]`: side, as a share of the image's, and centre x, y (down), from
    -1 to 1. The area is uniform from `MIN_AREA` to 1, the centre uniform within the image."""
    side = np.sqrt(random.uniform(MIN_AREA, 1, n))
    centre = random.uniform(-1, 1, (n, 2)) * (1 - side[:, None])
    return torch.from_numpy(np.column_stack([side, centre]).astype(np.float32))


def crop(images: Tensor, crops: Tensor) -> Tensor:
    """Cut `crops` `[n, 3]` out of float32 images `[n, 3, r, r]`, each enlarged to the same size."""
    n, r = len(images), images.shape[-1]
    side, x, y = crops[..., None, None].unbind(1)
    # No matrix product, as in `F.affine_grid`: in bfloat16 or TF32 it moves what is sampled.
    centres = (2 * torch.arange(r, device=images.device) + 1) / r - 1
    columns, rows = side * centres + x, side * centres[:, None] + y
    grid = torch.stack([columns.expand(n, r, r), rows.expand(n, r, r)], dim=-1)
    if images.device.type == "mps":
        return sample_without_border(images, grid)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def sample_without_border(images: Tensor, grid: Tensor) -> Tensor:
    """`grid_sample` with padding by the border, which not every torch has for `mps`."""
    outermost = 1 - 1 / images.shape[-1]
    return F.grid_sample(images, grid.clamp(-outermost, outermost), align_corners=False)


def draw_recolourings(n: int, random: np.random.Generator) -> Tensor:
    """n random affine maps of colours, `[n, 3, 4]`: for each new channel the factors of the old
    ones, and an offset. Hues are turned by a uniform angle about grey, each channel gets a `GAIN`
    and an `OFFSET`, and the map is mixed with the identity by a uniform weight for each image."""
    turns = hue_turns(random.uniform(0, 2 * math.pi, n))
    gains = random.uniform(*GAIN, (n, 3, 1))
    offsets = random.normal(0, OFFSET, (n, 3, 1))
    weight = random.uniform(0, 1, (n, 1, 1))
    factors = weight * gains * turns + (1 - weight) * np.eye(3)
    return torch.from_numpy(np.concatenate([factors, weight * offsets], axis=2).astype(np.float32))


def hue_turns(angles: np.ndarray) -> np.ndarray:
    """Rotations of colours about the axis of greys (1, 1, 1), by angles `[n]` -> `[n, 3, 3]`."""
    row = (1 + 2 * np.cos(angles[:, None] + 2 * math.pi / 3 * np.arange(3))) / 3
    return np.stack([np.roll(row, channel, axis=1) for channel in range(3)], axis=1)


def recolour(images: Tensor, colours: Tensor) -> Tensor:
    """Apply the maps `colours` `[n, 3, 4]` to float images `[n, 3, r, r]`."""
    factors, offsets = colours.split([3, 1], dim=2)
    return torch.baddbmm(offsets, factors, images.flatten(2)).view_as(images)


def reword(tokens: Tensor, draws: Tensor, words: range, padding: int = 0) -> Tensor:
    """Token ids `[n, l]`, in which random `words` replace tokens between the first and the last.
    `draws` `[n, 2 * l + 1]`, uniform from 0 to 1, are the probability of that for each text, and
    for each token whether and by which word it is replaced."""
    length = tokens.shape[1]
    probability, draws, others = draws.split([1, length, length], dim=1)
    used = (tokens != padding).int()
    after = used.flip(1).cumsum(1).flip(1) - used  # the number of tokens that follow
    inside = (after > 0) & (torch.arange(length) > 0)
    others = (words.start + others * len(words)).to(tokens.dtype)
    return torch.where(inside & (draws < probability), others, tokens)
