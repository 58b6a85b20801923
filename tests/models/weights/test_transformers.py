"""transformers' CLIPModel: the same features from the same weights, in and out."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from models import CLIP, build_model
from models.errors import InputError
from models.weights.config import Config
from models.weights.transformers import (
    config_from_transformers,
    config_to_transformers,
    from_transformers,
    is_transformers,
    to_transformers,
)

CONFIG = Config(
    embed_dim=48, image_resolution=64, vision_layers=3, vision_width=160, vision_patch_size=16,
    vision_mlp_width=500, vision_head_width=80, transformer_width=128, transformer_mlp_width=384,
    transformer_heads=4, transformer_layers=2, context_length=33, vocab_size=1000,
)  # fmt: skip


def their_model(activation, eos):
    """A CLIPModel whose activations are large enough that GELU and QuickGELU differ. `eos` is the
    id of the end of a text, or 2, by which transformers means the largest id."""
    text = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4,
            "num_hidden_layers": 2, "max_position_embeddings": 33, "vocab_size": 1000,
            "hidden_act": activation, "eos_token_id": eos}  # fmt: skip
    vision = {"hidden_size": 160, "intermediate_size": 500, "num_attention_heads": 2,
              "num_hidden_layers": 3, "image_size": 64, "patch_size": 16,
              "hidden_act": activation}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05))
    return model.eval()


def features(model, images, tokens):
    """Image and text features of ours or theirs, stacked."""
    if isinstance(model, CLIP):
        return torch.cat([model.encode_image(images), model.encode_text(tokens)])
    found = [model.get_image_features(images), model.get_text_features(tokens)]
    return torch.cat([getattr(f, "pooler_output", f) for f in found])


@pytest.fixture
def inputs():
    tokens = torch.randint(1, 990, (3, 20), generator=torch.Generator().manual_seed(0))
    for row, end in enumerate((5, 19, 11)):
        tokens[row, end] = 999
    return torch.randn(3, 3, 64, 64), tokens


@pytest.mark.parametrize("eos", [2, 999])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_their_weights_give_their_features(activation, eos, inputs):
    theirs = their_model(activation, eos)
    assert is_transformers(theirs.state_dict())
    config = config_from_transformers(theirs.config.to_dict(), {})
    ours = build_model(from_transformers(theirs.state_dict()), config)
    with torch.no_grad():
        expected = features(theirs, *inputs)
        torch.testing.assert_close(features(ours, *inputs), expected, atol=1e-4, rtol=1e-4)
        other = their_model({"gelu": "quick_gelu", "quick_gelu": "gelu"}[activation], eos)
        assert (features(other, *inputs) - expected).abs().max() > 1e-2


def test_our_weights_give_our_features_there_and_come_back_bit_for_bit(inputs):
    torch.manual_seed(0)
    ours = CLIP(CONFIG).initialize().eval()
    content, preprocessor = config_to_transformers(CONFIG)
    theirs = CLIPModel(CLIPConfig(**content)).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(
            features(theirs, *inputs), features(ours, *inputs), atol=1e-4, rtol=1e-4
        )
    back = from_transformers(theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in ours.state_dict().items())
    read = json.loads(json.dumps([content, preprocessor]))
    assert config_from_transformers(*read) == CONFIG


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "siglip"}, "siglip"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
    ],
)
def test_other_models_are_refused_by_the_field(change, named):
    content, _ = config_to_transformers(CONFIG)
    with pytest.raises(InputError, match=named):
        config_from_transformers(content | change, {})


def test_a_block_without_its_key_is_refused():
    weights = to_transformers(CLIP(CONFIG).state_dict())
    del weights["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(InputError, match=r"resblocks\.1\.attn.*only q, v"):
        from_transformers(weights)
