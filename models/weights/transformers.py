"""CLIP models of the library transformers (`CLIPModel`): their keys and description, and ours."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from models.config import MAX_SIZE, VOCABULARY, Config, check_config, description_of
from models.errors import InputError, quoted

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # has the same as "image_processor", which counts more
# Names that every CLIPModel has, and those with one of its towers or similar ones.
MARKS = {"text_model.final_layer_norm.weight", "vision_model.post_layernorm.weight"}
# What a config.json leaves out has these values, which are those of ViT-B/32.
TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
    "vocab_size": VOCABULARY,
}
TEXT_SIZES = {  # the fields of `Config` on any text tower, and transformers' names of them
    "transformer_width": "hidden_size",
    "transformer_mlp_width": "intermediate_size",
    "transformer_heads": "num_attention_heads",
    "transformer_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
}
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 32,
}
ENDS = (VOCABULARY - 1, 2)  # eos_token_id: of the end of a text, which also was written as 2
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

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


def is_transformers(names: Iterable[str]) -> bool:
    """Whether these are names of weights of a `CLIPModel`, a part of one, or a similar model."""
    return not MARKS.isdisjoint(names)


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` -> the same weights with our keys.

    Raises `InputError` for a block whose query, key and value are not all there.
    """
    ours: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if name.endswith("position_ids"):  # the numbers 0, 1, 2, ...
            continue
        if name in PROJECTIONS:
            ours[PROJECTIONS[name]] = tensor.T.contiguous()
        elif found := QUERY_KEY_VALUE.fullmatch(name):
            block, part, kind = found.groups()
            thirds.setdefault(f"{_our_name(block)}.attn.in_proj_{kind}", {})[part] = tensor
        else:
            ours[_our_name(name)] = tensor
    for key, parts in thirds.items():
        if parts.keys() != set("qkv"):
            raise InputError(
                f"{key}: of query, key and value only {', '.join(sorted(parts))}; download it anew"
            )
        ours[key] = torch.cat([parts[part] for part in "qkv"])
    return ours


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with our keys -> the same weights with the keys of a `CLIPModel`."""
    names = {ours: theirs for theirs, ours in PROJECTIONS.items()}
    theirs: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        block, found, kind = key.partition(".attn.in_proj_")
        if key in names:
            theirs[names[key]] = tensor.T.contiguous()
        elif found:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{_their_name(block)}.self_attn.{part}_proj.{kind}"] = third.contiguous()
        else:
            theirs[_their_name(key)] = tensor
    return theirs


def config_from_transformers(content: dict[str, Any], preprocessor: dict[str, Any]) -> Config:
    """Our description of the model that a config.json describes; `preprocessor` is the content of
    its preprocessor_config.json, or empty. Raises `InputError` that names what our models lack."""
    with description_of("a CLIPModel's"):
        if content.get("model_type") != "clip":
            raise InputError(
                f"its model_type is {quoted(content.get('model_type'))}, not 'clip'; take a whole "
                "CLIPModel, such as openai/clip-vit-base-patch32"
            )
        text = tower(content, "text_config", TEXT)
        image = image_tower(content, preprocessor)
        if text.get("hidden_act", "quick_gelu") != image["activation"]:
            raise InputError("its towers have another hidden_act each; one for both works")
        check_epsilon(text, "text_config", 1e-5)
        if text.get("eos_token_id", ENDS[0]) not in ENDS:
            found = quoted(text["eos_token_id"])
            raise InputError(f"its eos_token_id is {found}; {ENDS[0]} works, as in published CLIPs")
        config = Config(
            context_length=text["max_position_embeddings"],
            **{ours: text[theirs] for ours, theirs in TEXT_SIZES.items()},
            **image,
        )
    check_config(config)
    return config


def image_tower(content: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config` on images, of a `CLIPModel` or another with the same image tower."""
    vision = tower(content, "vision_config", VISION)
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise InputError(f"its hidden_act is {quoted(activation)}; gelu or quick_gelu work")
    check_epsilon(vision, "vision_config", 1e-5)
    return {
        "embed_dim": content.get("projection_dim", 512),
        "image_resolution": vision["image_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_width": vision["hidden_size"],
        "vision_patch_size": vision["patch_size"],
        "vision_mlp_width": vision["intermediate_size"],
        "vision_head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "activation": activation,
        **_preprocessing(preprocessor),
    }


def check_epsilon(tower: dict[str, Any], name: str, epsilon: float) -> None:
    """Raise `InputError` for norms with another epsilon than ours."""
    found = tower.get("layer_norm_eps", epsilon)
    if found != epsilon:
        raise InputError(f"its {name} has layer_norm_eps {quoted(found)}; only {epsilon:g} works")


def config_to_transformers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and of preprocessor_config.json for a model with a ViT. Raises
    `InputError` for a ResNet, which transformers has not."""
    vision, preprocessor = image_tower_to_transformers(config)
    text = {
        **{theirs: getattr(config, ours) for ours, theirs in TEXT_SIZES.items()},
        "max_position_embeddings": config.context_length,
        "hidden_act": config.activation,
        "projection_dim": config.embed_dim,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1,
    }
    model = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": text,
        "vision_config": vision,
    }
    return model, preprocessor


def image_tower_to_transformers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """`vision_config` and the content of preprocessor_config.json for a model with a ViT. Raises
    `InputError` for a ResNet."""
    if not config.is_vit:
        raise InputError("transformers has no CLIP with a ResNet; take --format open_clip")
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp_width,
        "num_attention_heads": config.vision_heads,
        "num_hidden_layers": config.vision_layers,
        "image_size": config.image_resolution,
        "patch_size": config.vision_patch_size,
        "hidden_act": config.activation,
        "projection_dim": config.embed_dim,
    }
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    side = config.image_resolution
    is_square = config.resize_mode == "squash"
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side} if is_square else {"shortest_edge": side},
        "resample": numbers[config.interpolation],
        "do_center_crop": not is_square,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "do_convert_rgb": True,
    }
    return vision, preprocessor


def tower(content: dict[str, Any], name: str, defaults: dict[str, int]) -> dict[str, Any]:
    """The description of a tower. Early ones have it as `..._config_dict`, which counts more."""
    found = defaults | (content.get(name) or {}) | (content.get(f"{name}_dict") or {})
    for field in defaults:
        if type(found[field]) is not int or not 0 < found[field] <= MAX_SIZE:
            raise InputError(f"its {name} has {field} {quoted(found[field])}")
    return found


def _preprocessing(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config` that preprocessor_config.json decides. Raises `InputError` for what is
    done to images otherwise than here: a square is cut out of all of the short side, or none."""
    if not content:
        return {}
    size, resample = content.get("size", 224), content.get("resample", 3)
    if resample not in INTERPOLATIONS:
        raise InputError(f"its resample is {quoted(resample)}; 2 (bilinear) and 3 (bicubic) work")
    size = size if isinstance(size, dict) else {"shortest_edge": size}
    is_square, is_cut = "height" in size, content.get("do_center_crop", True)
    sides = list(size.values())
    if is_cut:
        crop = content.get("crop_size", sides[0])
        sides += crop.values() if isinstance(crop, dict) else [crop]
    if not (is_square or is_cut) or any(side != sides[0] for side in sides):
        raise InputError(
            f"it resizes images to {quoted(size)} and cuts out {quoted(sides[len(size) :])}; only "
            "equal sides work here"
        )
    for field in ("do_resize", "do_rescale", "do_normalize"):
        if content.get(field, True) is not True:
            raise InputError(f"its {field} is {quoted(content[field])}; true works")
    fields: dict[str, Any] = {
        "interpolation": INTERPOLATIONS[resample],
        "resize_mode": "squash" if is_square else "shortest",
    }
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in content:
            fields[ours] = tuple(content[theirs])
    return fields


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
