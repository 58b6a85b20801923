"""Folders of open_clip. Its keys are ours; open_clip_config.json describes the model. Models with
other towers than ours are `OpenClipModel`s. For BERT, which open_clip lacks in this form,
`text_cfg` has two fields of our own: `tower` and `positions`."""

import math
from pathlib import Path
from typing import Any

import torch

from models.clip import CLIP
from models.config import VOCABULARY, Config, check_config, describing
from models.errors import InputError, naming, quoted
from models.files import read_json, write_json
from models.open_clip_model import (
    PREPROCESSING,
    OpenClipConfig,
    OpenClipModel,
    open_clip_config,
    square_side,
)
from models.weights.interface import Format, Weights, save_safetensors

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# By field of `Config`: the field of a tower's description and its default. Any other field of the
# description must have a value of `UNUSED` or `NEUTRAL`.
VISION = {
    "image_resolution": ("image_size", 224),
    "vision_layers": ("layers", 12),
    "vision_width": ("width", 768),
    "vision_head_width": ("head_width", 64),
    "vision_patch_size": ("patch_size", 16),
}
TEXT = {
    "context_length": ("context_length", 77),
    "vocab_size": ("vocab_size", VOCABULARY),
    "transformer_width": ("width", 512),
    "transformer_heads": ("heads", 8),
    "transformer_layers": ("layers", 12),
    "text_tower": ("tower", "clip"),
    "text_positions": ("positions", None),
}
LONG_CLIP_KEPT = 20  # positions that Long-CLIP (Zhang et al. 2024, section 3.1) keeps as they were
# Fields that change nothing about a loaded model, or that say what ours does anyway.
NEUTRAL = {"patch_dropout": None, "output_tokens": None, "pool_type": ("tok", "argmax"),
           "pos_embed_type": ("learnable",), "proj_type": ("linear",), "block_type": ("default",),
           "pad_id": None, "eos_id": None}  # fmt: skip
UNUSED = (None, False, {}, "")


def to_ours(weights: Weights) -> Weights:
    """The weights, Long-CLIP's two positional embeddings of texts joined."""
    others = weights.get("positional_embedding_res")
    if others is None:
        return weights
    weights = {key: t for key, t in weights.items() if key != "positional_embedding_res"}
    kept = weights["positional_embedding"][:LONG_CLIP_KEPT]
    return weights | {"positional_embedding": torch.cat([kept, others[LONG_CLIP_KEPT:]])}


class OtherTowers(InputError):
    """A description has a feature that our towers lack."""


def description(folder: Path) -> Config | OpenClipConfig | None:
    """The description in a folder; None if there is none."""
    content = read_json(folder / CONFIG_FILE)
    if content is None:
        return None
    with naming(CONFIG_FILE):
        return any_description(content, folder)


def any_description(content: dict[str, Any], folder: Path) -> Config | OpenClipConfig:
    """The description of our own model or, if it has other towers, of open_clip's in `folder`."""
    try:
        return from_open_clip(content)
    except OtherTowers as found:
        with describing():
            return open_clip_config(content, folder, str(found))


def with_towers(weights: Weights) -> Weights:
    """The weights with the keys of `OpenClipModel`: the text tower's start with `text.`"""
    others = ("visual.", "text.", "logit_")
    return {k if k.startswith(others) else f"text.{k}": t for k, t in weights.items()}


def write(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""
    if model.text_tower.language == "Chinese":
        raise InputError("open_clip has no Chinese-CLIP; take --format transformers or cn_clip")
    folder.mkdir()
    write_json(folder / CONFIG_FILE, to_open_clip(model.config))
    save_safetensors(model.state_dict(), folder / WEIGHTS_FILES[0], dtype)
    if isinstance(model, OpenClipModel):
        model.save_tokenizer(folder)


def from_open_clip(content: dict[str, Any]) -> Config:
    """Our description for the content of an open_clip_config.json, or of a file of open_clip's
    model_configs. Raises `InputError` for a feature that our models lack."""
    with describing():
        model = content.get("model_cfg", content)
        vision, vision_ratio = _tower(model, "vision_cfg", VISION)
        text, text_ratio = _tower(model, "text_cfg", TEXT)
        for field in ("multimodal_cfg", "init_logit_bias"):
            if model.get(field) not in UNUSED:
                raise OtherTowers(f'its description has "{field}"')
        if isinstance(vision["image_resolution"], tuple):
            vision["image_resolution"] = square_side(list(vision["image_resolution"]))
        vision["vision_mlp_width"] = int(vision["vision_width"] * vision_ratio)
        if isinstance(vision["vision_layers"], tuple):  # a ResNet
            vision |= {"vision_patch_size": None, "vision_mlp_width": None}
        preprocess = content.get("preprocess_cfg", {})
        config = Config(
            embed_dim=model["embed_dim"],
            transformer_mlp_width=int(text["transformer_width"] * text_ratio),
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            **vision | text,
            **{field: _plain(preprocess[field]) for field in PREPROCESSING if field in preprocess},
        )
    check_config(config)
    return config


def to_open_clip(config: Config | OpenClipConfig) -> dict[str, Any]:
    """The content of open_clip_config.json for a model."""
    if isinstance(config, OpenClipConfig):
        return config.content
    vision, text = (
        {theirs: getattr(config, ours) for ours, (theirs, _) in fields.items()}
        for fields in (VISION, TEXT)
    )
    if config.is_vit:
        vision["mlp_ratio"] = _ratio(config.vision_mlp_width, config.vision_width)
    text["mlp_ratio"] = _ratio(config.transformer_mlp_width, config.transformer_width)
    if config.text_tower == "clip":  # open_clip knows neither field
        del text["tower"], text["positions"]
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text,
                      "quick_gelu": config.activation == "quick_gelu"},
        "preprocess_cfg": {field: getattr(config, field) for field in PREPROCESSING},
    }  # fmt: skip


def _tower(model: dict, name: str, fields: dict) -> tuple[dict[str, Any], Any]:
    """The fields of `Config` on one tower, and the ratio of its MLPs' width to its own. Raises
    `OtherTowers` for a field that no tower of ours has."""
    tower = model[name]
    known = {"mlp_ratio", *(theirs for theirs, _ in fields.values())}
    for field, value in tower.items():
        neutral = NEUTRAL.get(field, ())  # None: any value
        if field in known or value in UNUSED or neutral is None or value in neutral:
            continue
        raise OtherTowers(f"its {name} has {quoted(field)}: {quoted(value)}")
    found = {ours: _plain(tower.get(theirs, value)) for ours, (theirs, value) in fields.items()}
    return found, tower.get("mlp_ratio", 4.0)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _ratio(mlp_width: int, width: int) -> float:
    """The ratio from which open_clip computes `mlp_width`, rounding down."""
    ratio = mlp_width / width
    while int(width * ratio) < mlp_width:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


FORMAT = Format(
    "a folder for the library open_clip",
    """
    import open_clip
    open_clip.create_model_and_transforms("local-dir:{0}")
    """,
    write,
    files=WEIGHTS_FILES,
    descriptions=(CONFIG_FILE,),
    to_ours=to_ours,
    description=description,
)
