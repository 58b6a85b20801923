"""The sizes of a model, read off the shapes of its weights, and checks that the weights fit."""

import math
from collections.abc import Collection
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import InputError
from models.transformer import HEAD_WIDTH

MOST_BLOCKS = 500  # of a tower; the largest published model has 36 in a row
KEYS_SHOWN = 3  # in an error message


def infer_architecture(state_dict: dict[str, Tensor]) -> dict:
    """The arguments of `CLIP` that these weights were made with."""
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
            places = state_dict["visual.attnpool.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": tuple(
                    count_blocks(state_dict, f"visual.layer{stage}") for stage in (1, 2, 3, 4)
                ),
                "vision_width": state_dict["visual.layer1.0.conv1.weight"].shape[0],
                "vision_patch_size": None,
                "image_resolution": math.isqrt(places) * 32,
            }
        else:
            width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
            places = state_dict["visual.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": count_blocks(state_dict, "visual.transformer.resblocks"),
                "vision_width": width,
                "vision_patch_size": patch_size,
                "image_resolution": math.isqrt(places) * patch_size,
            }
    except KeyError as error:
        raise InputError(_not_clip(f"{error} is missing", state_dict)) from None
    except (IndexError, ValueError):
        raise InputError(_not_clip("shapes differ", state_dict)) from None
    if math.isqrt(places) ** 2 != places:
        raise InputError(_not_clip(f"{places} places of an image are no square", state_dict))
    check_sizes(sizes | vision, state_dict)
    return sizes | vision


def check_sizes(architecture: dict, state_dict: dict[str, Tensor]) -> None:
    """Raise `InputError` for sizes that no model has, before one is built of them."""
    for name, value in architecture.items():
        for size in value if isinstance(value, tuple) else (value,):
            if size == 0 or ("layers" in name and size > MOST_BLOCKS):
                raise InputError(_not_clip(f"its {name} would be {value}", state_dict))
    is_vit = architecture["vision_patch_size"] is not None
    for name in ("transformer_width", "vision_width") if is_vit else ("transformer_width",):
        if architecture[name] % HEAD_WIDTH:
            reason = f"its {name} {architecture[name]} is no multiple of {HEAD_WIDTH}, a head's"
            raise InputError(_not_clip(reason, state_dict))


def _not_clip(reason: str, state_dict: dict[str, Tensor]) -> str:
    towers = {
        "image": any(key.startswith("visual.") for key in state_dict),
        "text": any(key.startswith("transformer.") for key in state_dict),
    }
    if sum(towers.values()) == 1:
        missing = next(tower for tower, is_there in towers.items() if not is_there)
        return f"half a CLIP model: the {missing} tower is missing; give the weights of both"
    return (
        f"these are not the weights of a CLIP model: {reason} (its keys: {_shown(state_dict)}); "
        "give weights with the published names, as open_clip saves them"
    )


def _shown(names: Collection[str]) -> str:
    """The first of many names, in one line of bearable length."""
    some = [name if name.isprintable() else repr(name) for name in islice(names, KEYS_SHOWN)]
    listed = ", ".join(name if len(name) <= 90 else f"{name[:90]}..." for name in some)
    more = len(names) - len(some)
    return f"{listed} and {more:,} more" if more else listed or "none"


def count_blocks(state_dict: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand under `prefix`."""
    depth = prefix.count(".") + 1
    return len({key.split(".")[depth] for key in state_dict if key.startswith(prefix + ".")})


def check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise one `InputError` for all keys that are unknown, missing or of another shape or type."""
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):  # a counter, which some files leave out
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
    found = [f"{kind}: {_shown(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights do not fit a CLIP model; {'; '.join(found)}; download or save them anew"
        )


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise one `InputError` for all tensors that hold NaN or infinity."""
    spoilt = [
        key
        for key, tensor in weights.items()
        # A sum takes no memory, and is finite only if all its terms are.
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()
    ]
    if spoilt:
        raise InputError(
            f"NaN or infinity in the weights, so that every result would be NaN: {_shown(spoilt)}; "
            "take weights from before the training went wrong"
        )


def check_resolution(architecture: dict, input_shape: int) -> int:
    """Raise `InputError` for a resolution that the vision tower's cells do not divide; return the
    side of a cell in pixels: a patch, or 32, since a ResNet halves its input five times."""
    cell = architecture["vision_patch_size"] or 32
    if input_shape < cell or input_shape % cell:
        nearest = max(1, round(input_shape / cell)) * cell
        raise InputError(
            f"--input_shape {input_shape} is not a multiple of {cell}, as this model needs it; "
            f"the nearest that is: {nearest}"
        )
    return cell


def resize_positional_embedding(
    weights: dict[str, Tensor], architecture: dict, input_shape: int
) -> dict[str, Tensor]:
    """The weights for images of side `input_shape`: the grid part of the vision tower's positional
    embedding, bicubically interpolated (Dosovitskiy et al. 2021, section 3.2)."""
    cell = check_resolution(architecture, input_shape)
    is_vit = architecture["vision_patch_size"] is not None
    key = "visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding"
    first, grid = weights[key][:1], weights[key][1:]
    old, new = architecture["image_resolution"] // cell, input_shape // cell
    grid = grid.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return weights | {key: torch.cat([first, grid.flatten(2)[0].T])}
