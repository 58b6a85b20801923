"""Folders of the library transformers: `CLIPModel`, and `ChineseCLIPModel`, which has BERT."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import (
    CHINESE_CONTEXT_LENGTH,
    MAX_SIZE,
    VOCABULARY,
    Config,
    check_config,
    description_of,
)
from models.errors import InputError, naming, quoted
from models.files import read_json
from models.weights.interface import Format, Weights, save_safetensors, write_json, write_tokenizer

if TYPE_CHECKING:
    from models.weights.hub import Repository

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"  # its "image_processor" takes precedence
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
MODEL_TYPES = {  # by `model_type` of config.json: our text tower, the model and one on the hub
    "clip": ("clip", "CLIPModel", "openai/clip-vit-base-patch32"),
    "chinese_clip": ("bert", "ChineseCLIPModel", "OFA-Sys/chinese-clip-vit-base-patch16"),
}
# Names that every CLIPModel, or a similar model, and every ChineseCLIPModel has.
BERT_MARK = "text_model.embeddings.word_embeddings.weight"
MARKS = {"text_model.final_layer_norm.weight", "vision_model.post_layernorm.weight", BERT_MARK}
BUFFERS = ("position_ids", "token_type_ids")  # the numbers 0, 1, 2, ... and zeros
# The defaults of a config.json, those of ViT-B/32 and of BERT.
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
        "num_hidden_layers": 12, "max_position_embeddings": 77,
        "vocab_size": VOCABULARY}  # fmt: skip
BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": 12, "max_position_embeddings": 512, "vocab_size": 30522}  # fmt: skip
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
          "num_hidden_layers": 12, "image_size": 224, "patch_size": 32}  # fmt: skip
BERT_EPSILON = 1e-12  # of its norms
TEXT_SIZES = {  # the fields of `Config` on any text tower, and their names in transformers
    "transformer_width": "hidden_size",
    "transformer_mlp_width": "intermediate_size",
    "transformer_heads": "num_attention_heads",
    "transformer_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
}
VISION_FIELDS = {  # the same of the image tower
    "image_resolution": "image_size",
    "vision_layers": "num_hidden_layers",
    "vision_width": "hidden_size",
    "vision_patch_size": "patch_size",
    "vision_mlp_width": "intermediate_size",
    "activation": "hidden_act",
}
SIGLIP_SIZES = {1024: "L", 1152: "SO400M", 1536: "gopt"}  # in open_clip's names, by width
SIGLIP_VERSIONS = {250_000: "SigLIP-i18n", 256_000: "SigLIP2"}  # by vocabulary
ENDS = (VOCABULARY - 1, 2)  # eos_token_id, in early files 2
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


def recognises(weights: Weights) -> bool:
    """Whether the keys are those of a `CLIPModel`, a part of one, or a similar model."""
    return not MARKS.isdisjoint(weights)


def to_ours(weights: Weights) -> Weights:
    """The same weights with our keys. Raises `InputError` for a block whose query, key and value
    are not all there."""
    ours: Weights = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    has_bert = BERT_MARK in weights
    for name, tensor in weights.items():
        if name.endswith(BUFFERS):
            continue
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
        if parts.keys() != set("qkv"):
            raise InputError(
                f"{key}: of query, key and value only {', '.join(sorted(parts))}; download it anew"
            )
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


def description(folder: Path, weights: Weights) -> Config | None:
    """The description in a folder; None if there is none."""
    content = read_json(folder / CONFIG_FILE)
    if content is None:
        return None
    is_chinese = any(key.startswith("bert.") for key in weights)
    expected = "chinese_clip" if is_chinese else "clip"
    with naming(CONFIG_FILE):
        from_transformers(content, {}, expected)  # errors of this file are raised here
    processor = read_json(folder / PROCESSOR_FILE) or {}
    name, preprocessor = PROCESSOR_FILE, processor.get("image_processor")
    if preprocessor is None:
        name, preprocessor = PREPROCESSOR_FILE, read_json(folder / PREPROCESSOR_FILE) or {}
    with naming(name):
        return from_transformers(content, preprocessor, expected)


def fetch(repository: "Repository") -> Path | None:
    """The folder of a repository with a description, preprocessing if it has one, and weights."""
    found = repository.get(CONFIG_FILE)
    if found is None or read_json(found).get("model_type") not in [*MODEL_TYPES]:
        return None
    # A model whose preprocessing is unknown must not be taken for one without any.
    files = (PREPROCESSOR_FILE, PROCESSOR_FILE)
    is_prepared = any([repository.get(file) for file in files])
    is_known = is_prepared or not repository.unknown.intersection(files)
    return found.parent if is_known and repository.has_weights(WEIGHTS_FILES) else None


def write(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder for `from_pretrained` of `CLIPModel` and `CLIPProcessor`, or of
    `ChineseCLIPModel` and `ChineseCLIPProcessor`."""
    config, preprocessor = config_to_transformers(model.config)
    folder.mkdir()
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, config | {"torch_dtype": dtype_name})
    write_json(folder / PREPROCESSOR_FILE, preprocessor)
    save_safetensors(to_transformers(model.state_dict()), folder / WEIGHTS_FILES[0], dtype)
    write_tokenizer(model, folder)


def from_transformers(
    content: dict[str, Any], preprocessor: dict[str, Any], model_type: str
) -> Config:
    """Our description for the `content` of a config.json of this `model_type`; `preprocessor` is
    that of preprocessor_config.json, or empty. Raises `InputError` for a feature that our models
    lack."""
    text_tower, model, example = MODEL_TYPES[model_type]
    with description_of(f"a {model}'s"):
        if content.get("model_type") != model_type:
            found = quoted(content.get("model_type"))
            if twin := open_clips_twin(content):
                raise InputError(f"its model_type is {found}; take open_clip's copy: {twin}")
            raise InputError(
                f"its model_type is {found}, not '{model_type}'; take a whole {model}, such as "
                f"{example}"
            )
        image = _image_tower(content, preprocessor)
        if text_tower == "bert" and not preprocessor:
            image["resize_mode"] = "squash"  # as the authors do
        read_text = _bert if text_tower == "bert" else _clip_text
        config = Config(**image | read_text(content, image["activation"]))
    check_config(config)
    return config


def open_clips_twin(content: dict[str, Any]) -> str | None:
    """open_clip's name of the SigLIP that the `content` of a config.json describes; None if it
    describes another model. What a config.json leaves out is as in the smallest SigLIP."""
    if content.get("model_type") != "siglip":
        return None
    vision, text = (content.get(f"{tower}_config") or {} for tower in ("vision", "text"))
    size = SIGLIP_SIZES.get(vision.get("hidden_size"), "B")
    version = SIGLIP_VERSIONS.get(text.get("vocab_size"), "SigLIP")
    patch, side = vision.get("patch_size", 16), vision.get("image_size", 224)
    return f"ViT-{size}-{patch}-{version}{'' if side == 224 else f'-{side}'}/webli"


def _clip_text(content: dict[str, Any], activation: str) -> dict[str, Any]:
    """The fields of `Config` on CLIP's own text tower."""
    text = _tower(content, "text_config", TEXT)
    if text.get("hidden_act", "quick_gelu") != activation:
        raise InputError("its towers have another hidden_act each; one for both works")
    _check_epsilon(text, "text_config", 1e-5)
    if text.get("eos_token_id", ENDS[0]) not in ENDS:
        found = quoted(text["eos_token_id"])
        raise InputError(f"its eos_token_id is {found}; {ENDS[0]} works, as in published CLIPs")
    sizes = {ours: text[theirs] for ours, theirs in TEXT_SIZES.items()}
    return sizes | {"context_length": text["max_position_embeddings"]}


def _bert(content: dict[str, Any], _: str) -> dict[str, Any]:
    """The fields of `Config` on BERT."""
    text = _tower(content, "text_config", BERT)
    for field, value in (("hidden_act", "gelu"), ("type_vocab_size", 2)):
        if (found := text.get(field, value)) != value:
            raise InputError(f"its text_config has {field} {quoted(found)}; only {value} works")
    _check_epsilon(text, "text_config", BERT_EPSILON)
    positions = text["max_position_embeddings"]
    sizes = {ours: text[theirs] for ours, theirs in TEXT_SIZES.items()}
    return sizes | {
        # Not a field of transformers': we write it, and the library keeps unknown fields.
        "context_length": text.get("context_length", min(CHINESE_CONTEXT_LENGTH, positions)),
        "text_tower": "bert",
        "text_positions": positions,
    }


def _image_tower(content: dict[str, Any], preprocessor: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config` on images."""
    vision = _tower(content, "vision_config", VISION)
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise InputError(f"its hidden_act is {quoted(activation)}; gelu or quick_gelu work")
    _check_epsilon(vision, "vision_config", 1e-5)
    vision["hidden_act"] = activation
    return {
        **{ours: vision[theirs] for ours, theirs in VISION_FIELDS.items()},
        "embed_dim": content.get("projection_dim", 512),
        "vision_head_width": vision["hidden_size"] // vision["num_attention_heads"],
        **_preprocessing(preprocessor),
    }


def _check_epsilon(tower: dict[str, Any], name: str, epsilon: float) -> None:
    """Raise `InputError` for norms with another epsilon than ours."""
    found = tower.get("layer_norm_eps", epsilon)
    if found != epsilon:
        raise InputError(f"its {name} has layer_norm_eps {quoted(found)}; only {epsilon:g} works")


def config_to_transformers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and of preprocessor_config.json. Raises `InputError` for a
    ResNet."""
    if not config.is_vit:
        raise InputError("transformers has no CLIP with a ResNet; take --format open_clip")
    is_chinese = config.text_tower == "bert"
    model_type = "chinese_clip" if is_chinese else "clip"
    text = {theirs: getattr(config, ours) for ours, theirs in TEXT_SIZES.items()}
    if is_chinese:
        text |= {"max_position_embeddings": config.text_positions, "hidden_act": "gelu",
                 "layer_norm_eps": BERT_EPSILON,
                 "context_length": config.context_length}  # fmt: skip
    else:
        text |= {"max_position_embeddings": config.context_length, "hidden_act": config.activation,
                 "projection_dim": config.embed_dim, "bos_token_id": VOCABULARY - 2,
                 "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}  # fmt: skip
    vision = {theirs: getattr(config, ours) for ours, theirs in VISION_FIELDS.items()}
    vision |= {"num_attention_heads": config.vision_heads, "projection_dim": config.embed_dim}
    model = {"architectures": [MODEL_TYPES[model_type][1]], "model_type": model_type,
             "projection_dim": config.embed_dim, "logit_scale_init_value": 2.6592,
             "text_config": text, "vision_config": vision}  # fmt: skip
    numbers = {name: number for number, name in INTERPOLATIONS.items()}
    side = config.image_resolution
    is_square = config.resize_mode == "squash"
    square = {"height": side, "width": side}
    preprocessor = {
        "image_processor_type": f"{'Chinese' if is_chinese else ''}CLIPImageProcessor",
        "do_resize": True, "size": square if is_square else {"shortest_edge": side},
        "resample": numbers[config.interpolation],
        "do_center_crop": not is_square, "crop_size": square,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": list(config.mean), "image_std": list(config.std),
    }  # fmt: skip
    return model, preprocessor


def _tower(content: dict[str, Any], name: str, defaults: dict[str, int]) -> dict[str, Any]:
    """The description of a tower; `..._config_dict`, of early versions, takes precedence."""
    found = defaults | (content.get(name) or {}) | (content.get(f"{name}_dict") or {})
    for field in defaults:
        if type(found[field]) is not int or not 0 < found[field] <= MAX_SIZE:
            raise InputError(f"its {name} has {field} {quoted(found[field])}")
    return found


def _preprocessing(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config` in preprocessor_config.json. Raises `InputError` for a preprocessing
    that differs from ours, such as a crop smaller than the short side."""
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


FORMAT = Format(
    "a folder for the library transformers, which has no ResNets",
    """
    from transformers import {clip}Model, {clip}Processor
    {clip}Model.from_pretrained("{0}")
    {clip}Processor.from_pretrained("{0}")
    """,
    write,
    files=WEIGHTS_FILES,
    recognises=recognises,
    to_ours=to_ours,
    description=description,
    fetch=fetch,
    hub_files="{}, {} and {} (or {})".format(CONFIG_FILE, PREPROCESSOR_FILE, *WEIGHTS_FILES),
)
