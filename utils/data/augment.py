"""Light augmentation of training images: a crop that keeps nearly everything.

No flip, no rotation, no change of colour: each of them can make a caption wrong ("on the left", "a
red shirt"). A crop that keeps nine tenths of the image leaves nearly every caption true.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_AREA = 0.9


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
