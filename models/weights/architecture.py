"""The architecture of a model from the shapes of its weights; checks of weights; resolutions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import CHINESE_CONTEXT_LENGTH, Config, check_config
from models.errors import InputError, listed

HEAD_WIDTH = 64  # of the attention heads in most published models
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # in open_clip's ViT-H, g, bigG and e
RESNET_STRIDE = 32  # pixels of an image to a position: a ResNet halves the image five times


def infer_config(state_dict: dict[str, Tensor]) -> Config:
    """The description of a model, inferred from the shapes of its weights; the rest is as in the
    published models. Raises `InputError` if they are not the weights of a CLIP model."""
    has_bert = any(key.startswith("bert.") for key in state_dict)
    is_resnet = any(key.startswith("visual.layer1.") for key in state_dict)
    try:
        text_tower = (_bert if has_bert else _clip_text)(state_dict)
        if is_resnet:
            positions = state_dict["visual.attnpool.positional_embedding"].shape[0] - 1
            vision_layers = tuple(
                count_blocks(state_dict, f"visual.layer{stage}") for stage in (1, 2, 3, 4)
            )
            vision_width = state_dict["visual.layer1.0.conv1.weight"].shape[0]
            patch_size = mlp_width = None
        else:
            positions = state_dict["visual.positional_embedding"].shape[0] - 1
            vision_layers = count_blocks(state_dict, "visual.transformer.resblocks")
            vision_width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
            mlp_width = len(state_dict["visual.transformer.resblocks.0.mlp.c_fc.bias"])
        config = Config(
            embed_dim=state_dict["text_projection"].shape[1],
            image_resolution=math.isqrt(positions) * (patch_size or RESNET_STRIDE),
            vision_layers=vision_layers,
            vision_width=vision_width,
            vision_patch_size=patch_size,
            vision_mlp_width=mlp_width,
            vision_head_width=HEAD_WIDTHS.get(0 if is_resnet else vision_width, HEAD_WIDTH),
            **text_tower,
        )
        check_config(config)
    except (LookupError, TypeError, ValueError) as error:  # also an InputError
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(
            f"these are not the weights of a whole CLIP: {reason} (its keys: {listed(state_dict)});"
            " give weights with the published names, as open_clip saves them"
        ) from None
    return config


def _clip_text(state_dict: dict[str, Tensor]) -> dict[str, int]:
    """The fields of `Config` on CLIP's own text tower."""
    width = state_dict["ln_final.weight"].shape[0]
    return {
        "transformer_width": width,
        "transformer_mlp_width": len(state_dict["transformer.resblocks.0.mlp.c_fc.bias"]),
        "transformer_heads": width // HEAD_WIDTH,
        "transformer_layers": count_blocks(state_dict, "transformer.resblocks"),
        "context_length": state_dict["positional_embedding"].shape[0],
        "vocab_size": state_dict["token_embedding.weight"].shape[0],
    }


def _bert(state_dict: dict[str, Tensor]) -> dict[str, int | str]:
    """The fields of `Config` on BERT, and the resizing of Chinese-CLIP."""
    vocabulary, width = state_dict["bert.embeddings.word_embeddings.weight"].shape
    positions = state_dict["bert.embeddings.position_embeddings.weight"].shape[0]
    return {
        "text_tower": "bert",
        "text_positions": positions,
        "transformer_width": width,
        "transformer_mlp_width": len(state_dict["bert.encoder.layer.0.intermediate.dense.bias"]),
        "transformer_heads": width // HEAD_WIDTH,
        "transformer_layers": count_blocks(state_dict, "bert.encoder.layer"),
        "context_length": min(CHINESE_CONTEXT_LENGTH, positions),
        "vocab_size": vocabulary,
        "resize_mode": "squash",
    }


def count_blocks(state_dict: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks of a stack, whose keys are `prefix.0...`, `prefix.1...` and so on."""
    depth = prefix.count(".") + 1
    return len({key.split(".")[depth] for key in state_dict if key.startswith(prefix + ".")})


def check_resolution(config: Config, input_shape: int) -> int:
    """The stride of the image tower: pixels from one position of its positional embedding to the
    next. Raises `InputError` if the resolution `input_shape`, in pixels, is no multiple of it."""
    stride = config.vision_patch_size or RESNET_STRIDE
    if input_shape < stride or input_shape % stride:
        nearest = max(1, round(input_shape / stride)) * stride
        raise InputError(
            f"--input_shape {input_shape} is not a multiple of {stride}; the nearest is {nearest}"
        )
    return stride


def resize_positional_embedding(
    weights: dict[str, Tensor], config: Config, input_shape: int
) -> dict[str, Tensor]:
    """The weights for images of `input_shape` by `input_shape` pixels: the positional embedding of
    the image tower, `[1 + positions, c]`, is interpolated (bicubic) on the square of its positions
    (Dosovitskiy et al. 2021, section 3.2), but for its first row, of the class token or the mean.
    Raises `InputError` as `check_resolution` does."""
    stride = check_resolution(config, input_shape)
    key = "visual.positional_embedding" if config.is_vit else "visual.attnpool.positional_embedding"
    first, grid = weights[key][:1], weights[key][1:]
    old, new = config.image_resolution // stride, input_shape // stride
    grid = grid.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return weights | {key: torch.cat([first, grid.flatten(2)[0].T])}


def check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists missing and unknown keys, and keys of another shape or
    type than `expected`. Adds a missing `num_batches_tracked` to `weights` as zero, and makes a
    tensor `[1]` a scalar where one is expected, as some programs save `logit_scale`."""
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):  # has no effect; some files leave it out
            weights[key] = torch.zeros((), dtype=torch.long)
    common = [key for key in expected if key in weights]
    for key in common:
        if expected[key].ndim == 0 and weights[key].shape == (1,):
            weights[key] = weights[key][0]
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "of another shape or type": [
            f"{key} {_kind(weights[key])} instead of {_kind(expected[key])}"
            for key in common
            if _kind(weights[key]) != _kind(expected[key])
        ],
    }
    found = [f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys]
    if found:
        problem = f"the weights do not fit a CLIP model; {'; '.join(found)}"
        raise InputError(f"{problem}; download or save them anew")


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {'floats' if tensor.is_floating_point() else 'integers'}"


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise one `InputError` that lists the tensors with NaN or infinity."""
    not_finite = [
        key
        for key, tensor in weights.items()
        # The sum needs no memory. If it is finite, all numbers are; else it may have overflowed.
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()
    ]
    if not_finite:
        raise InputError(f"NaN or infinity in the weights: {listed(not_finite)}; take earlier ones")
