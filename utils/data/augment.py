"""Random changes of training images and captions.

What is learned from is cropped only: a flip, a rotation or other colours can make a caption wrong
("on the left", "a red shirt"), and a crop that keeps nine tenths of the image leaves nearly every
caption true. Other colours and other words are for --distill, where nothing has to be true.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_AREA = 0.9
GAIN = 0.5, 1.5  # of each channel, from the first to the second
OFFSET = 0.3  # standard deviation of what is added to a channel


def draw_crops(n: int, random: np.random.Generator) -> Tensor:
    """n random square crops, `[n, 3]`: side, centre x, centre y.

    The side is relative to the image's side; the centre is in coordinates from -1 to 1, y
    downwards. The area is uniform from `MIN_AREA` to 1; the centre is uniform over all places at
    which the crop lies within the image.
    """
    side = np.sqrt(random.uniform(MIN_AREA, 1, n))
    centre = random.uniform(-1, 1, (n, 2)) * (1 - side[:, None])
    return torch.from_numpy(np.column_stack([side, centre]).astype(np.float32))


def crop(images: Tensor, crops: Tensor) -> Tensor:
    """Cut `crops` `[n, 3]` out of float images `[n, 3, r, r]` and enlarge them to the same size."""
    side, x, y = crops.unbind(1)
    zero = torch.zeros_like(side)
    rows = [torch.stack([side, zero, x], 1), torch.stack([zero, side, y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    if images.device.type == "mps":
        return sample_without_border(images, grid)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def sample_without_border(images: Tensor, grid: Tensor) -> Tensor:
    """`grid_sample` with padding by the border, which `mps` has not in every torch: no place lies
    beyond the centres of the outermost pixels."""
    outermost = 1 - 1 / images.shape[-1]
    return F.grid_sample(images, grid.clamp(-outermost, outermost), align_corners=False)


def draw_recolourings(n: int, random: np.random.Generator) -> Tensor:
    """n random changes of colour, `[n, 3, 4]`: the factors of the three channels in each new
    channel, and what is added to it, for images that are normalised.

    Hues are turned by any angle, which leaves grey as it is; then each channel is multiplied and
    shifted. Of all that an image gets a share that is uniform from nothing to all.
    """
    turns = hue_turns(random.uniform(0, 2 * math.pi, n))
    gains = random.uniform(*GAIN, (n, 3, 1))
    offsets = random.normal(0, OFFSET, (n, 3, 1))
    share = random.uniform(0, 1, (n, 1, 1))
    factors = share * gains * turns + (1 - share) * np.eye(3)
    return torch.from_numpy(np.concatenate([factors, share * offsets], axis=2).astype(np.float32))


def hue_turns(angles: np.ndarray) -> np.ndarray:
    """Rotations of colours about the axis of greys (1, 1, 1), by angles `[n]` -> `[n, 3, 3]`."""
    row = (1 + 2 * np.cos(angles[:, None] + 2 * math.pi / 3 * np.arange(3))) / 3
    return np.stack([np.roll(row, channel, axis=1) for channel in range(3)], axis=1)


def recolour(images: Tensor, colours: Tensor) -> Tensor:
    """Float images `[n, 3, r, r]` in other `colours` `[n, 3, 4]`."""
    factors, offsets = colours.split([3, 1], dim=2)
    return torch.baddbmm(offsets, factors, images.flatten(2)).view_as(images)


def reword(tokens: Tensor, draws: Tensor, words: range) -> Tensor:
    """Token ids `[n, l]` as a tokenizer makes them, with others of `words` in place of some: of
    each text a share, which is uniform from none to all, of what lies between its first and last
    token. `draws` `[n, 2 * l + 1]` are uniform from 0 to 1."""
    length = tokens.shape[1]
    share, draws, others = draws.split([1, length, length], dim=1)
    after = tokens.flip(1).cumsum(1).flip(1) - tokens  # the sum of the ids that follow
    inside = (after > 0) & (torch.arange(length) > 0)
    others = (words.start + others * len(words)).to(tokens.dtype)
    return torch.where(inside & (draws < share), others, tokens)
