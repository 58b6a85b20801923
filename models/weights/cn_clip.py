"""Chinese-CLIP models of transformers (`ChineseCLIPModel`) and of their authors' package cn_clip:
their keys and description, and ours. Our keys are cn_clip's."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from models.config import CHINESE_CONTEXT_LENGTH, Config, check_config, description_of
from models.errors import InputError, quoted
from models.weights import transformers

WEIGHTS_FILES = "clip_cn_*.pt"  # as cn_clip names them
RESNET = ("OFA-Sys/chinese-clip-rn50", "clip_cn_rn50.pt")  # repository on the hub, its only weights
EPSILON = 1e-12  # of BERT's norms
TEXT = {  # what a config.json leaves out has these values
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}
# The ViTs of cn_clip, all with QuickGELU: blocks, width and patch size.
AUTHORS_VITS = {(12, 768, 16), (12, 768, 32), (24, 1024, 14), (32, 1280, 14)}


def is_transformers(names: Iterable[str]) -> bool:
    """Whether these are names of weights of a `ChineseCLIPModel`."""
    return "text_model.embeddings.word_embeddings.weight" in set(names)


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `ChineseCLIPModel` -> the same weights with our keys. Raises `InputError` as
    `transformers.from_transformers` does."""
    bert = {n: t for n, t in weights.items() if n.startswith("text_model.")}
    ours = transformers.from_transformers({n: t for n, t in weights.items() if n not in bert})
    buffers = ("position_ids", "token_type_ids")  # the numbers 0, 1, 2, ... and zeros
    return ours | {
        name.replace("text_model", "bert", 1): tensor
        for name, tensor in bert.items()
        if not name.endswith(buffers)
    }


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with our keys -> the same weights with the keys of a `ChineseCLIPModel`."""
    bert = {key: tensor for key, tensor in weights.items() if key.startswith("bert.")}
    theirs = transformers.to_transformers({k: t for k, t in weights.items() if k not in bert})
    return theirs | {key.replace("bert", "text_model", 1): t for key, t in bert.items()}


def config_from_transformers(content: dict[str, Any], preprocessor: dict[str, Any]) -> Config:
    """Our description of the model that a config.json describes; `preprocessor` is the content of
    its preprocessor_config.json, or empty. Raises `InputError` that names what our models lack."""
    with description_of("a ChineseCLIPModel's"):
        if content.get("model_type") != "chinese_clip":
            raise InputError(
                f"its model_type is {quoted(content.get('model_type'))}, not 'chinese_clip'; take "
                "a whole ChineseCLIPModel, such as OFA-Sys/chinese-clip-vit-base-patch16"
            )
        text = transformers.tower(content, "text_config", TEXT)
        for field, value in (("hidden_act", "gelu"), ("type_vocab_size", 2)):
            if (found := text.get(field, value)) != value:
                raise InputError(f"its text_config has {field} {quoted(found)}; only {value} works")
        transformers.check_epsilon(text, "text_config", EPSILON)
        positions = text["max_position_embeddings"]
        image = transformers.image_tower(content, preprocessor)
        if not preprocessor:
            image["resize_mode"] = "squash"  # as the authors do
        config = Config(
            **{ours: text[theirs] for ours, theirs in transformers.TEXT_SIZES.items()},
            # Not a field of transformers': we write it, and it keeps what it does not know.
            context_length=text.get("context_length", min(CHINESE_CONTEXT_LENGTH, positions)),
            text_tower="bert",
            text_positions=positions,
            **image,
        )
    check_config(config)
    return config


def config_to_transformers(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of config.json and of preprocessor_config.json for a model with a ViT. Raises
    `InputError` for a ResNet, which transformers has not."""
    vision, preprocessor = transformers.image_tower_to_transformers(config)
    text = {
        **{theirs: getattr(config, ours) for ours, theirs in transformers.TEXT_SIZES.items()},
        "max_position_embeddings": config.text_positions,
        "context_length": config.context_length,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
    }
    model = {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": text,
        "vision_config": vision,
    }
    return model, preprocessor | {"image_processor_type": "ChineseCLIPImageProcessor"}


def without_pooler(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file of cn_clip without those of BERT's pooler, which is never used."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith("bert.pooler.")}


def is_of_authors(config: Config) -> bool:
    """Whether the weights of this model tell its activation: cn_clip has such an image tower, or it
    is a ResNet, no part of which has such an activation."""
    vit = config.vision_layers, config.vision_width, config.vision_patch_size
    return config.text_tower == "bert" and (not config.is_vit or vit in AUTHORS_VITS)
