"""Folders of the library transformers: `CLIPModel`, and `ChineseCLIPModel`, which has BERT."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import CHINESE_CONTEXT_LENGTH, VOCABULARY, Config, check_config, describing
from models.errors import InputError, naming, quoted
from models.files import read_json, write_json
from models.weights.interface import Format, Weights, save_safetensors, write_tokenizer

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # its "image_processor" takes precedence
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# Names that every CLIPModel, or a similar model, and every ChineseCLIPModel has.
BERT_MARK = "text_model.embeddings.word_embeddings.weight"
MARKS = {"text_model.final_layer_norm.weight", "vision_model.post_layernorm.weight", BERT_MARK}

# By field of `Config`: the field of config.json and its default, that of ViT-B/32 or of BERT.
VISION = {
    "image_resolution": ("image_size", 224),
    "vision_layers": ("num_hidden_layers", 12),
    "vision_width": ("hidden_size", 768),
    "vision_heads": ("num_attention_heads", 12),
    "vision_patch_size": ("patch_size", 32),
    "vision_mlp_width": ("intermediate_size", 3072),
    "activation": ("hidden_act", "quick_gelu"),
}
CLIP_TEXT = {
    "transformer_width": ("hidden_size", 512),
    "transformer_mlp_width": ("intermediate_size", 2048),
    "transformer_heads": ("num_attention_heads", 8),
    "transformer_layers": ("num_hidden_layers", 12),
    "vocab_size": ("vocab_size", VOCABULARY),
    "context_length": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
}
BERT_TEXT = {
    "transformer_width": ("hidden_size", 768),
    "transformer_mlp_width": ("intermediate_size", 3072),
    "transformer_heads": ("num_attention_heads", 12),
    "transformer_layers": ("num_hidden_layers", 12),
    "vocab_size": ("vocab_size", 30522),
    "text_positions": ("max_position_embeddings", 512),
    # Not a field of transformers': we write it, and the library keeps unknown fields.
    "context_length": ("context_length", CHINESE_CONTEXT_LENGTH),
}
# The values of other fields that work, first the default, which we write.
NORMS = {"layer_norm_eps": (1e-5,)}
CLIP_ONLY = NORMS | {"eos_token_id": (VOCABULARY - 1, 2)}  # in early files 2
BERT_ONLY = {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,), "type_vocab_size": (2,)}
PREPROCESSOR_ONLY = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), (True,))
TEXT_TOWERS = {"clip": (CLIP_TEXT, CLIP_ONLY), "bert": (BERT_TEXT, BERT_ONLY)}
MODEL_TYPES = {"clip": "clip", "chinese_clip": "bert"}  # `model_type` and our text tower
INTERPOLATIONS = {3: "bicubic", 2: "bilinear"}  # Pillow's numbers

TOWERS = {"text_model": "", "vision_model": "visual."}
TO_THEIRS = {  # names of ours within a tower, then within a block
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_final": "final_layer_norm",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
TO_OURS = {theirs: ours for ours, theirs in TO_THEIRS.items()}
QUERY_KEY_VALUE = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")
PROJECTIONS = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}


def to_ours(weights: Weights) -> Weights:
    """The same weights with our keys."""
    ours: Weights = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    has_bert = BERT_MARK in weights
    for name, tensor in weights.items():
        if has_bert and name.startswith("text_model."):
            ours[name.replace("text_model", "bert", 1)] = tensor
        elif name in PROJECTIONS:
            ours[PROJECTIONS[name]] = tensor.T.contiguous()
        elif found := QUERY_KEY_VALUE.fullmatch(name):
            block, part, kind = found.groups()
            thirds.setdefault(f"{_our_name(block)}.attn.in_proj_{kind}", {})[part] = tensor
        else:
            ours[_our_name(name)] = tensor
    for key, parts in thirds.items():
        if len(parts) == 3:  # else `check_keys` tells that the key is missing
            ours[key] = torch.cat([parts[part] for part in "qkv"])
    return ours


def to_transformers(weights: Weights) -> Weights:
    """Weights with our keys -> the same weights with transformers' keys."""
    names = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    theirs: Weights = {}
    for key, tensor in weights.items():
        block, found, kind = key.partition(".attn.in_proj_")
        if key.startswith("bert."):
            theirs[key.replace("bert", "text_model", 1)] = tensor
        elif key in names:
            theirs[names[key]] = tensor.T.contiguous()
        elif found:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{_their_name(block)}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            theirs[_their_name(key)] = tensor
    return theirs


def description(folder: Path) -> Config | None:
    """The description in a folder; None if there is none."""
    content = read_json(folder / CONFIG_FILE)
    if content is None:
        return None
    with naming(CONFIG_FILE):
        from_transformers(content, {})  # errors of this file are raised here
    preprocessor = (read_json(folder / PROCESSOR_FILE) or {}).get("image_processor")
    if preprocessor is None:
        preprocessor = read_json(folder / PREPROCESSOR_FILE) or {}
    with naming(PREPROCESSOR_FILE):
        return from_transformers(content, preprocessor)


def write(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder for `from_pretrained` of `CLIPModel` or `ChineseCLIPModel`, and processors."""
    config, preprocessor = config_to_transformers(model.config)
    folder.mkdir()
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, config | {"torch_dtype": dtype_name})
    write_json(folder / PREPROCESSOR_FILE, preprocessor)
    save_safetensors(to_transformers(model.state_dict()), folder / WEIGHTS_FILES[0], dtype)
    write_tokenizer(model, folder)


def from_transformers(content: dict[str, Any], preprocessor: dict[str, Any]) -> Config:
    """Our description for the `content` of a config.json; `preprocessor` is that of
    preprocessor_config.json, or empty. Raises `InputError` for a feature that our models lack."""
    with describing():
        model_type = content.get("model_type")
        if model_type not in MODEL_TYPES:
            raise InputError(
                f"its model_type is {quoted(model_type)}, not {' or '.join(MODEL_TYPES)}; take a "
                "whole CLIPModel or ChineseCLIPModel, or a SigLIP such as ViT-B-16-SigLIP/webli"
            )
        text_tower = MODEL_TYPES[model_type]
        vision = _section(content, "vision_config", VISION, NORMS)
        text = _section(content, "text_config", *TEXT_TOWERS[text_tower])
        if text.get("activation", vision["activation"]) != vision["activation"]:
            raise InputError("its towers differ in hidden_act; only one value for both works")
        if text_tower == "bert":
            text["context_length"] = min(text["context_length"], text["text_positions"])
        config = Config(
            embed_dim=content.get("projection_dim", 512),
            vision_head_width=vision["vision_width"] // vision.pop("vision_heads"),
            text_tower=text_tower,
            **text | vision | _preprocessing(preprocessor, text_tower),
        )
    check_config(config)
    return config


def config_to_transformers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and preprocessor_config.json. `InputError` for a ResNet."""
    if not config.is_vit:
        raise InputError("transformers has no CLIP with a ResNet; take --format open_clip")
    model_type = next(name for name, tower in MODEL_TYPES.items() if tower == config.text_tower)
    chinese = "Chinese" if config.text_tower == "bert" else ""
    table, only = TEXT_TOWERS[config.text_tower]
    text, vision = (
        {theirs: getattr(config, ours) for ours, (theirs, _) in fields.items()}
        | {"projection_dim": config.embed_dim}
        | {field: values[0] for field, values in others.items()}
        for fields, others in ((table, only), (VISION, NORMS))
    )
    if not chinese:
        text |= {"bos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 1}
    model = {"architectures": [f"{chinese}CLIPModel"], "model_type": model_type,
             "projection_dim": config.embed_dim,
             "text_config": text, "vision_config": vision}  # fmt: skip
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    side, is_square = config.image_resolution, config.resize_mode == "squash"
    square = {"height": side, "width": side}
    preprocessor = {
        "image_processor_type": f"{chinese}CLIPImageProcessor",
        "size": square if is_square else {"shortest_edge": side}, "crop_size": square,
        "resample": numbers[config.interpolation], "do_center_crop": not is_square,
        "image_mean": list(config.mean), "image_std": list(config.std),
    }  # fmt: skip
    return model, preprocessor


def _section(content: dict, name: str, table: dict, only: dict) -> dict[str, Any]:
    """The fields of `Config` in a section. `..._dict`, of early versions, takes precedence."""
    section = (content.get(name) or {}) | (content.get(f"{name}_dict") or {})
    _check(section, only, f"{name} has ")
    return {ours: section.get(theirs, default) for ours, (theirs, default) in table.items()}


def _check(section: dict, only: dict[str, tuple], where: str = "") -> None:
    """Raise `InputError` for a field with another value than those that work."""
    for field, values in only.items():
        if (found := section.get(field, values[0])) not in values:
            working = " or ".join(map(str, values))
            raise InputError(f"its {where}{field} {quoted(found)}; only {working} works")


def _preprocessing(content: dict[str, Any], text_tower: str) -> dict[str, Any]:
    """The fields of `Config` in preprocessor_config.json. `InputError` for what our models lack."""
    if not content:
        return {"resize_mode": "squash"} if text_tower == "bert" else {}  # as the authors do
    _check(content, PREPROCESSOR_ONLY | {"resample": (*INTERPOLATIONS,)})
    size = content.get("size", 224)
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    is_square, is_cut = "height" in size, content.get("do_center_crop", True)
    crop = content.get("crop_size", {}) if is_cut else {}
    sides = {*size.values(), *(crop.values() if isinstance(crop, dict) else [crop])}
    if not (is_square or is_cut) or len(sides) > 1:
        raise InputError(f"it resizes images to {quoted(size)} and cuts out {quoted(crop)}; only "
                         "equal sides work here")  # fmt: skip
    colours = [name for name in ("mean", "std") if f"image_{name}" in content]
    return {
        "interpolation": INTERPOLATIONS[content.get("resample", 3)],
        "resize_mode": "squash" if is_square else "shortest",
    } | {name: tuple(content[f"image_{name}"]) for name in colours}


def _our_name(name: str) -> str:
    tower, _, rest = name.partition(".")
    return name if tower not in TOWERS else TOWERS[tower] + _renamed(rest, TO_OURS)


def _their_name(key: str) -> str:
    if key == "logit_scale":
        return key
    tower = "vision_model" if key.startswith("visual.") else "text_model"
    return f"{tower}.{_renamed(key.removeprefix('visual.'), TO_THEIRS)}"


def _renamed(name: str, table: dict[str, str]) -> str:
    """A name within a tower with its parts replaced: at its start, and after a block's number."""
    for old, new in table.items():
        name = re.sub(rf"(^|(?<=\d\.)){re.escape(old)}(?=\.|$)", new, name)
    return name


FORMAT = Format(
    "a folder for the library transformers, which has no ResNets",
    """
    from transformers import {clip}Model, {clip}Processor
    {clip}Model.from_pretrained("{0}")
    {clip}Processor.from_pretrained("{0}")
    """,
    write,
    files=WEIGHTS_FILES,
    descriptions=(CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE),
    recognises=lambda weights: not MARKS.isdisjoint(weights),
    to_ours=to_ours,
    description=description,
)
