"""The architecture of a model, inferred from its weights, and checks that the weights fit it."""

import math
from collections.abc import Collection
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import InputError
from models.transformer import HEAD_WIDTH

MAX_BLOCKS = 500  # of a tower, or of a ResNet's stage; the largest published model has 36
MAX_KEYS_LISTED = 3  # in an error message
MAX_KEY_LENGTH = 90  # characters of a key in an error message
RESNET_STRIDE = 32  # pixels of an image to a position: a ResNet halves the image five times


def infer_architecture(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of `CLIP` for a model that these weights fit. Raises `InputError` if they are
    not the weights of a CLIP model."""
    try:
        text_width = state_dict["ln_final.weight"].shape[0]
        sizes = {
            "embed_dim": state_dict["text_projection"].shape[1],
            "context_length": state_dict["positional_embedding"].shape[0],
            "vocab_size": state_dict["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_heads": text_width // HEAD_WIDTH,
            "transformer_layers": count_blocks(state_dict, "transformer.resblocks"),
        }
        if any(key.startswith("visual.layer1.") for key in state_dict):
            positions = state_dict["visual.attnpool.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": tuple(
                    count_blocks(state_dict, f"visual.layer{stage}") for stage in (1, 2, 3, 4)
                ),
                "vision_width": state_dict["visual.layer1.0.conv1.weight"].shape[0],
                "vision_patch_size": None,
                "image_resolution": math.isqrt(positions) * RESNET_STRIDE,
            }
        else:
            width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
            positions = state_dict["visual.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": count_blocks(state_dict, "visual.transformer.resblocks"),
                "vision_width": width,
                "vision_patch_size": patch_size,
                "image_resolution": math.isqrt(positions) * patch_size,
            }
    except KeyError as error:
        raise InputError(_not_clip(f"{error} is missing", state_dict)) from None
    except (IndexError, ValueError):
        raise InputError(_not_clip("its shapes are different", state_dict)) from None
    if math.isqrt(positions) ** 2 != positions:
        reason = f"the {positions} positions in an image do not form a square"
        raise InputError(_not_clip(reason, state_dict))
    check_sizes(sizes | vision, state_dict)
    return sizes | vision


def check_sizes(architecture: dict[str, Any], state_dict: dict[str, Tensor]) -> None:
    """Raise `InputError` for sizes that no model can have, before building one could take very long
    or fail. `state_dict` is only for the message."""
    for name, value in architecture.items():
        for size in value if isinstance(value, tuple) else (value,):
            if size == 0 or ("layers" in name and size > MAX_BLOCKS):
                raise InputError(_not_clip(f"its {name} would be {value}", state_dict))
    is_vit = architecture["vision_patch_size"] is not None
    for name in ("transformer_width", "vision_width") if is_vit else ("transformer_width",):
        if architecture[name] % HEAD_WIDTH:
            reason = (
                f"its {name} {architecture[name]} is no multiple of {HEAD_WIDTH}, "
                "the width of an attention head"
            )
            raise InputError(_not_clip(reason, state_dict))


def _not_clip(reason: str, state_dict: dict[str, Tensor]) -> str:
    """The message for weights that no CLIP model has."""
    towers = {
        "image": any(key.startswith("visual.") for key in state_dict),
        "text": any(key.startswith("transformer.") for key in state_dict),
    }
    if sum(towers.values()) == 1:
        missing = next(tower for tower, is_there in towers.items() if not is_there)
        return f"half a CLIP model: the {missing} tower is missing; give the weights of both"
    return (
        f"these are not the weights of a CLIP model: {reason} (its keys: {_listed(state_dict)}); "
        "give weights with the published names, as open_clip saves them"
    )


def _listed(names: Collection[str]) -> str:
    """The first few names in one line, and the number of the others."""
    some = [name if name.isprintable() else repr(name) for name in islice(names, MAX_KEYS_LISTED)]
    listed = ", ".join(
        name if len(name) <= MAX_KEY_LENGTH else f"{name[:MAX_KEY_LENGTH]}..." for name in some
    )
    more = len(names) - len(some)
    return f"{listed} and {more:,} more" if more else listed or "none"


def count_blocks(state_dict: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks of a stack, whose keys are `prefix.0...`, `prefix.1...` and so on."""
    depth = prefix.count(".") + 1
    return len({key.split(".")[depth] for key in state_dict if key.startswith(prefix + ".")})


def check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists the keys that are missing, unknown, or of another shape or
    type than `expected`. A missing `num_batches_tracked` is added to `weights` as zero."""
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):  # has no effect; some files leave it out
            weights[key] = torch.zeros((), dtype=torch.long)
    common = [key for key in expected if key in weights]
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "wrongly shaped": [
            f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
            for key in common
            if weights[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {weights[key].dtype} instead of {expected[key].dtype}"
            for key in common
            if expected[key].is_floating_point() and not weights[key].is_floating_point()
        ],
    }
    found = [f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights do not fit a CLIP model; {'; '.join(found)}; download or save them anew"
        )


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists the tensors with NaN or infinity."""
    not_finite = [
        key
        for key, tensor in weights.items()
        # The sum comes first, because it needs no memory. If it is finite, all numbers are; if not,
        # it may be that finite numbers were too large to add up.
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()
    ]
    if not_finite:
        raise InputError(
            "NaN or infinity in the weights, so that every result would be NaN: "
            f"{_listed(not_finite)}; take weights from before the training went wrong"
        )


def check_resolution(architecture: dict[str, Any], input_shape: int) -> int:
    """Return the stride of the image tower: how many pixels there are from one position of its
    positional embedding to the next. Raise `InputError` if the resolution `input_shape`, in pixels,
    is not a multiple of it."""
    stride = architecture["vision_patch_size"] or RESNET_STRIDE
    if input_shape < stride or input_shape % stride:
        nearest = max(1, round(input_shape / stride)) * stride
        raise InputError(
            f"--input_shape {input_shape} is not a multiple of {stride}, which this model needs; "
            f"the nearest multiple is {nearest}"
        )
    return stride


def resize_positional_embedding(
    weights: dict[str, Tensor], architecture: dict[str, Any], input_shape: int
) -> dict[str, Tensor]:
    """The weights for images of `input_shape` by `input_shape` pixels.

    The positional embedding of the image tower, `[1 + positions, c]`, is interpolated (bicubic) on
    the square of its positions (Dosovitskiy et al. 2021, section 3.2). Its first row, which stands
    for the whole image, is kept. Raises `InputError` as `check_resolution` does.
    """
    stride = check_resolution(architecture, input_shape)
    is_vit = architecture["vision_patch_size"] is not None
    key = "visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding"
    first, grid = weights[key][:1], weights[key][1:]
    old, new = architecture["image_resolution"] // stride, input_shape // stride
    grid = grid.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return weights | {key: torch.cat([first, grid.flatten(2)[0].T])}
