"""Files of cn_clip, the package of Chinese-CLIP's authors. Its keys are ours."""

from pathlib import Path

import torch

from models.clip import CLIP
from models.errors import InputError
from models.weights import open_clip
from models.weights.interface import Format, Weights, cast, save_archive


def to_ours(weights: Weights) -> Weights:
    """The weights without BERT's pooler, which no model uses."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith("bert.pooler.")}


def write(model: CLIP, file: Path, dtype: torch.dtype) -> None:
    """A file that cn_clip's `load_from_name` opens."""
    if model.config.text_tower != "bert":
        raise InputError("cn_clip has no other models than Chinese-CLIPs; take another --format")
    save_archive({"state_dict": cast(model.state_dict(), dtype)}, file)


FORMAT = Format(
    "a file for the authors' program, of a Chinese-CLIP",
    """
    from cn_clip.clip import load_from_name
    load_from_name("{0}", vision_model_name=..., text_model_name=..., input_resolution=...)
    """,
    write,
    files=("clip_cn_*.pt",),
    recognises=lambda weights: any(key.startswith("bert.") for key in weights),
    to_ours=to_ours,
    description=open_clip.description,
)
