"""Folders of open_clip. Its keys are ours; open_clip_config.json describes the model. Models with
other towers than ours are `OpenClipModel`s.

For a model with BERT, which open_clip lacks in this form, `text_cfg` has two fields of our own:
`tower` and `positions`.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.clip import CLIP
from models.config import MAX_SIZE, VOCABULARY, Config, check_config, description_of
from models.errors import InputError, naming, quoted
from models.files import read_json
from models.hf_tokenizer import FILES as TOKENIZER_FILES
from models.open_clip_model import OpenClipConfig, OpenClipModel, open_clip_config
from models.weights.interface import Format, Weights, save_safetensors, write_json

if TYPE_CHECKING:
    from models.weights.hub import Repository

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Fields that our models have, with open_clip's defaults. Any other field must have a value of
# `UNUSED` or `NEUTRAL`.
VISION = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0,
          "patch_size": 16}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12,
        "mlp_ratio": 4.0, "tower": "clip", "positions": None}  # fmt: skip
LONG_CLIP_KEPT = 20  # positions that Long-CLIP (Zhang et al. 2024, section 3.1) keeps as they were
# Fields that change nothing about a loaded model, or that say what ours does anyway.
NEUTRAL = {"patch_dropout": None, "output_tokens": None, "pool_type": ("tok", "argmax"),
           "pos_embed_type": ("learnable",), "proj_type": ("linear",), "block_type": ("default",),
           "pad_id": None, "eos_id": None}  # fmt: skip
UNUSED = (None, False, {}, "")


def to_ours(weights: Weights) -> Weights:
    """The weights, Long-CLIP's two positional embeddings of texts joined: the first for the
    positions that it keeps, the second for the others."""
    others = weights.get("positional_embedding_res")
    if others is None or "positional_embedding" not in weights:
        return weights
    weights = {key: t for key, t in weights.items() if key != "positional_embedding_res"}
    kept = weights["positional_embedding"][:LONG_CLIP_KEPT]
    return weights | {"positional_embedding": torch.cat([kept, others[LONG_CLIP_KEPT:]])}


class OtherTowers(InputError):
    """A description has a feature that our towers lack."""


def description(folder: Path, weights: Weights | None = None) -> Config | OpenClipConfig | None:
    """The description in a folder; None if there is none."""
    content = read_json(folder / CONFIG_FILE)
    if content is None:
        return None
    with naming(CONFIG_FILE):
        return any_description(content, folder)


def any_description(content: dict[str, Any], folder: Path) -> Config | OpenClipConfig:
    """The description of our own model or, if it has other towers, of open_clip's; the files of its
    tokenizer may lie in `folder`."""
    try:
        return from_open_clip(content)
    except OtherTowers as found:
        with description_of("that of a CLIP model"):
            return open_clip_config(content, folder, str(found))


def with_towers(weights: Weights) -> Weights:
    """The weights with the keys of `OpenClipModel`: the text tower's start with `text.`"""
    others = ("visual.", "text.", "logit_")
    named = {k if k.startswith(others) else f"text.{k}": t for k, t in weights.items()}
    named.pop("text.transformer.embeddings.position_ids", None)  # of transformers before 4.31
    return named


def fetch(repository: "Repository") -> Path | None:
    """The folder of a repository with a description and weights."""
    if found := repository.get(CONFIG_FILE):
        about = description(found.parent)  # other models are refused before a large download
        if isinstance(about, OpenClipConfig) and about.model["text_cfg"].get("hf_tokenizer_name"):
            for file in TOKENIZER_FILES:
                repository.get(file)
        if repository.has_weights(WEIGHTS_FILES):
            return found.parent
    return None


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
    with description_of("that of a CLIP model"):
        model = content.get("model_cfg", content)
        vision = _tower(model, "vision_cfg", VISION)
        text = _tower(model, "text_cfg", TEXT)
        for field in ("multimodal_cfg", "init_logit_bias"):
            if model.get(field) not in UNUSED:
                raise OtherTowers(f'its description has "{field}"')
        is_resnet = isinstance(vision["layers"], list)
        preprocess = content.get("preprocess_cfg", {})
        known = ("mean", "std", "interpolation", "resize_mode")
        config = Config(
            embed_dim=model["embed_dim"],
            image_resolution=_side(vision["image_size"]),
            vision_layers=tuple(vision["layers"]) if is_resnet else vision["layers"],
            vision_width=vision["width"],
            vision_patch_size=None if is_resnet else vision["patch_size"],
            vision_head_width=vision["head_width"],
            vision_mlp_width=None if is_resnet else _mlp_width(vision),
            transformer_width=text["width"],
            transformer_mlp_width=_mlp_width(text),
            transformer_heads=text["heads"],
            transformer_layers=text["layers"],
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            text_tower=text["tower"],
            text_positions=text["positions"],
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            **{k: _plain(preprocess[k]) for k in known if k in preprocess},
        )
    check_config(config)
    return config


def to_open_clip(config: Config | OpenClipConfig) -> dict[str, Any]:
    """The content of open_clip_config.json for a model."""
    if isinstance(config, OpenClipConfig):
        return config.content
    vision: dict[str, Any] = {
        "image_size": config.image_resolution,
        "layers": list(config.vision_layers) if not config.is_vit else config.vision_layers,
        "width": config.vision_width,
        "patch_size": config.vision_patch_size,
        "head_width": config.vision_head_width,
    }
    if config.is_vit:
        vision["mlp_ratio"] = _ratio(config.vision_mlp_width, config.vision_width)
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.transformer_width,
        "heads": config.transformer_heads,
        "layers": config.transformer_layers,
        "mlp_ratio": _ratio(config.transformer_mlp_width, config.transformer_width),
    }
    if config.text_tower != "clip":
        text |= {"tower": config.text_tower, "positions": config.text_positions}
    quick_gelu = config.activation == "quick_gelu"
    return {
        "model_cfg": {"embed_dim": config.embed_dim, "quick_gelu": quick_gelu,
                      "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": list(config.mean), "std": list(config.std),
                           "interpolation": config.interpolation,
                           "resize_mode": config.resize_mode},
    }  # fmt: skip


def _tower(model: dict[str, Any], name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of one tower. Raises `OtherTowers` for a field that no tower of ours has."""
    tower = model[name]
    for field, value in tower.items():
        neutral = NEUTRAL.get(field, ())  # None: any value
        if field in fields or value in UNUSED or neutral is None or value in neutral:
            continue
        raise OtherTowers(f"its {name} has {quoted(field)}: {quoted(value)}")
    return fields | {field: value for field, value in tower.items() if field in fields}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _side(image_size: Any) -> Any:
    if not isinstance(image_size, list):
        return image_size
    if not all(type(side) is int for side in image_size) or len(set(image_size)) != 1:
        sides = quoted(image_size)
        raise InputError(f"it takes images of {sides} pixels; only square ones work here")
    return image_size[0]


def _mlp_width(tower: dict[str, Any]) -> int:
    """Raises `InputError` for other types than numbers; Python multiplies texts and lists, too."""
    for field in ("width", "mlp_ratio"):
        if not isinstance(tower[field], int | float) or not 0 < tower[field] <= MAX_SIZE:
            raise InputError(f"its {field} would be {quoted(tower[field])}")
    return int(tower["width"] * tower["mlp_ratio"])


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
    to_ours=to_ours,
    description=description,
    fetch=fetch,
    hub_files="{} and {} (or {})".format(CONFIG_FILE, *WEIGHTS_FILES),
)
