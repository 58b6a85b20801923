"""The CLIP models of open_clip, transformers and cn_clip, to compare ours with, given the same
weights."""

import open_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import ChineseCLIPConfig, ChineseCLIPModel, CLIPConfig, CLIPModel

from models.weights.config import Config
from models.weights.registry import CONFIGS

TEXT = {"context_length": 77, "vocab_size": 49408}


def open_clip_model(
    name: str,
    vision_layers: int | tuple[int, ...] | None = None,
    text_layers: int | None = None,
) -> nn.Module:
    """open_clip's model of a published architecture, with random weights. `vision_layers` and
    `text_layers` are for a model of less depth."""
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
    text_width = len(weights["ln_final.weight"])

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
        | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
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
