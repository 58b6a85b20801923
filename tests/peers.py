"""The CLIP models of open_clip, transformers and cn_clip, to compare ours with, given the same
weights."""

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from torch import Tensor, nn
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from models.config import VOCABULARY, Config
from models.tokens import clip_tokenizer
from models.weights.registry import CONFIGS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # of the small models' images
TEXT = {"context_length": 77, "vocab_size": 49408}


def open_clip_model(
    name: str,
    vision_layers: int | tuple[int, ...] | None = None,
    text_layers: int | None = None,
    vocabulary: int = VOCABULARY,
) -> nn.Module:
    """open_clip's model of a published architecture, with random weights. `vision_layers` and
    `text_layers` are for a model of less depth, `vocabulary` for one that knows fewer tokens."""
    config = CONFIGS[name]
    vision = {
        "layers": vision_layers or config.vision_layers,
        "width": config.vision_width,
        "patch_size": config.vision_patch_size,
        "image_size": config.image_resolution,
    }
    text = TEXT | {
        "width": config.transformer_width,
        "heads": config.transformer_heads,
        "layers": text_layers or config.transformer_layers,
        "vocab_size": vocabulary,
    }
    torch.manual_seed(0)
    model = open_clip.model.CLIP(config.embed_dim, vision, text, quick_gelu=True)
    disturb(model)
    return model.eval()


def disturb(model: nn.Module) -> None:
    """Add noise to biases and norms. They start at zero and one, where an error in their use would
    not show."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.1)


def transformers_model(weights: dict[str, Tensor]) -> CLIPModel:
    """transformers' CLIP with these weights, whose image tower is a ViT."""
    width, _, patch, _ = weights["visual.conv1.weight"].shape
    side = int((len(weights["visual.positional_embedding"]) - 1) ** 0.5) * patch
    vocabulary, text_width = weights["token_embedding.weight"].shape

    def tower(width: int, prefix: str) -> dict:
        layers = 1 + max(
            int(k[len(prefix) :].split(".")[0]) for k in weights if k.startswith(prefix)
        )
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 64,
            "num_hidden_layers": layers,
        }

    config = CLIPConfig(
        text_config=tower(text_width, "transformer.resblocks.")
        | {"vocab_size": vocabulary, "max_position_embeddings": 77, "eos_token_id": vocabulary - 1},
        vision_config=tower(width, "visual.transformer.resblocks.")
        | {"image_size": side, "patch_size": patch},
        projection_dim=weights["text_projection"].shape[1],
    )
    model = CLIPModel(config)
    model.load_state_dict(to_transformers(weights), strict=False)
    return model.eval()


def to_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, with the published keys -> the same with transformers' keys."""
    renamed = {
        "logit_scale": weights["logit_scale"],
        "visual_projection.weight": weights["visual.proj"].T,
        "text_projection.weight": weights["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            renamed[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
    towers = {"transformer": "text_model", "visual.transformer": "vision_model"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    for key, tensor in weights.items():
        tower, found, rest = key.partition(".resblocks.")
        if not found:
            continue
        number, part = rest.split(".", 1)
        layer = f"{towers[tower]}.encoder.layers.{number}."
        if part.startswith("attn.in_proj_"):
            for name, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{layer}self_attn.{name}_proj.{part.removeprefix('attn.in_proj_')}"] = (
                    third
                )
        else:
            module, kind = part.rsplit(".", 1)
            renamed[f"{layer}{parts[module]}.{kind}"] = tensor
    return renamed


def small_open_clip(
    quick_gelu: bool = False,
    width: int = 128,
    head_width: int = 64,
    layers: int | list[int] = 2,
    context: int = 77,
) -> tuple[nn.Module, dict]:
    """(model, its description): random weights, and a ViT or, with a list of layers, a ResNet."""
    vision = {"image_size": 64, "layers": layers, "width": width, "head_width": head_width}
    text = {"context_length": context, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    description = {"embed_dim": 48, "vision_cfg": vision | {"patch_size": 16}, "text_cfg": text}
    description |= {"quick_gelu": True} if quick_gelu else {}
    model = open_clip.model.CLIP(**description)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bilinear", "resize_mode": "squash"}
    set_model_preprocess_cfg(model, preprocess)
    return _enlarged(model), description


def small_transformers(
    activation: str = "quick_gelu", width: int = 128, heads: int = 2, eos: int = 49407
) -> CLIPModel:
    """With random weights. `eos` is the id of the end of a text, or 2, by which transformers means
    the largest id."""
    text = {"hidden_size": 64, "intermediate_size": 200, "num_attention_heads": 1,
            "num_hidden_layers": 2, "vocab_size": 49408, "eos_token_id": eos}  # fmt: skip
    vision = {"hidden_size": width, "intermediate_size": 500, "num_attention_heads": heads,
              "num_hidden_layers": 2, "image_size": 64, "patch_size": 16}  # fmt: skip
    act = {"hidden_act": activation}
    config = CLIPConfig(text_config=text | act, vision_config=vision | act, projection_dim=48)
    return _enlarged(CLIPModel(config))


def save_open_clip(model: nn.Module, description: dict, folder: Path) -> None:
    """As open_clip saves a model for a hub: both files of weights, and the description."""
    no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    save_for_hf(model, no_tokenizer, description, folder)


def save_transformers(
    model: CLIPModel, folder: Path, processor: bool = True, **options: object
) -> None:
    """With a processor, whose images are in processor_config.json, or with the settings of images
    alone, in preprocessor_config.json."""
    model.save_pretrained(folder, **options)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, image_mean=list(MEAN),
                                image_std=list(STD), resample=2)  # fmt: skip
    if not processor:
        images.save_pretrained(folder)
        return
    bpe = clip_tokenizer()
    (folder / "vocab.json").write_text(json.dumps(bpe.encoder))
    merges = "\n".join(["#version: 0.2", *map(" ".join, bpe.merges)])
    (folder / "merges.txt").write_text(merges, "utf-8")
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)


@torch.no_grad()
def their_features(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of images and of texts, by a model of any of the libraries, or by ours."""
    if not isinstance(model, CLIPModel):
        return model.encode_image(images), model.encode_text(tokens)
    found = model.get_image_features(images), model.get_text_features(tokens)
    return tuple(getattr(one, "pooler_output", one) for one in found)


def _enlarged(model: nn.Module) -> nn.Module:
    """With activations where GELU and QuickGELU are far apart, and no bias that is zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "c_fc.weight" in key or "fc1.weight" in key:
                parameter.copy_(torch.randn_like(parameter) * (3 / parameter.shape[1] ** 0.5))
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model.eval()


def chinese_clip_model(config: Config) -> ChineseCLIPModel:
    """transformers' Chinese-CLIP of this description, with a ViT, random weights and no dropout."""
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": config.vision_mlp_width,
        "num_attention_heads": config.vision_heads,
        "num_hidden_layers": config.vision_layers,
        "image_size": config.image_resolution,
        "patch_size": config.vision_patch_size,
        "hidden_act": config.activation,
    }
    text = {
        "hidden_size": config.transformer_width,
        "intermediate_size": config.transformer_mlp_width,
        "num_attention_heads": config.transformer_heads,
        "num_hidden_layers": config.transformer_layers,
        "max_position_embeddings": config.text_positions,
        "vocab_size": config.vocab_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(0)
    model = ChineseCLIPModel(
        ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_dim)
    )
    disturb(model)
    return model.eval()


def cn_clip_model(config: Config, weights: dict[str, Tensor]) -> nn.Module:
    """cn_clip's model of this description with these weights, without dropout; the test is skipped
    if cn_clip is not installed."""
    module = pytest.importorskip("cn_clip.clip.model", reason="needs cn_clip")
    model = module.CLIP(
        embed_dim=config.embed_dim,
        image_resolution=config.image_resolution,
        vision_layers=config.vision_layers,
        vision_width=config.vision_width,
        vision_patch_size=config.vision_patch_size,
        vision_head_width=config.vision_head_width,
        vocab_size=config.vocab_size,
        text_attention_probs_dropout_prob=0.0,
        text_hidden_act="gelu",
        text_hidden_dropout_prob=0.0,
        text_hidden_size=config.transformer_width,
        text_initializer_range=0.02,
        text_intermediate_size=config.transformer_mlp_width,
        text_max_position_embeddings=config.text_positions,
        text_num_attention_heads=config.transformer_heads,
        text_num_hidden_layers=config.transformer_layers,
        text_type_vocab_size=2,
    )
    model.load_state_dict(weights)
    return model.eval()
