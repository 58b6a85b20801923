"""Files of cn_clip, the package of Chinese-CLIP's authors. Its keys are ours."""

from pathlib import Path

import torch

from models.clip import CLIP
from models.config import Config
from models.errors import InputError
from models.weights import open_clip
from models.weights.interface import Format, Weights, cast

# The ViTs of cn_clip, all with QuickGELU: blocks, width and patch size.
VITS = {(12, 768, 16), (12, 768, 32), (24, 1024, 14), (32, 1280, 14)}


def recognises(weights: Weights) -> bool:
    return any(key.startswith("bert.") for key in weights)


def to_ours(weights: Weights) -> Weights:
    """The weights without BERT's pooler, which no model uses."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith("bert.pooler.")}


def is_of_authors(config: Config) -> bool:
    """Whether the sizes tell the activation: those of a ViT of cn_clip, or of any ResNet, because a
    ResNet with BERT does not use `activation`."""
    vit = config.vision_layers, config.vision_width, config.vision_patch_size
    return config.text_tower == "bert" and (not config.is_vit or vit in VITS)


def write(model: CLIP, file: Path, dtype: torch.dtype) -> None:
    """A file that cn_clip's `load_from_name` opens."""
    if model.config.text_tower != "bert":
        raise InputError("cn_clip has no other models than Chinese-CLIPs; take another --format")
    try:
        with file.open("wb") as opened:
            torch.save({"state_dict": cast(model.state_dict(), dtype)}, opened)
    except RuntimeError as error:  # torch fails a check of its own on a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


FORMAT = Format(
    "a file for the authors' program, of a Chinese-CLIP",
    """
    from cn_clip.clip import load_from_name
    load_from_name("{0}", vision_model_name=..., text_model_name=..., input_resolution=...)
    """,
    write,
    files=("clip_cn_*.pt",),
    recognises=recognises,
    to_ours=to_ours,
    description=open_clip.description,
)
