"""open_clip's descriptions: the models that they make of the same weights are the same."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CLIP, build_model
from models.errors import InputError
from models.weights.config import Config
from models.weights.open_clip import from_open_clip, to_open_clip

DESCRIPTIONS = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
}
# What in a description says that the model has a tower or a tokenizer of another kind.
OTHER = ("timm_model_name", "hf_model_name", "hf_tokenizer_name", "multimodal_cfg", "no_ln_pre",
         "ls_init_value", "attentional_pool", "embed_cls")  # fmt: skip
OWN = [name for name, d in DESCRIPTIONS.items() if not any(o in json.dumps(d) for o in OTHER)]
# One of each width of heads (64, 80, 88, 104), each activation, both kinds of image towers.
FAMILIES = ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "RN50",
            "RN50-quickgelu", "ViT-B-16-plus-240"]  # fmt: skip


def test_there_are_about_forty_models_of_open_clips_own_kind():
    assert len(OWN) == 41 and set(FAMILIES) <= set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_every_model_of_its_own_kind_has_open_clips_keys_and_shapes(name):
    config = from_open_clip(DESCRIPTIONS[name])
    with torch.device("meta"):
        ours = CLIP(config).state_dict()
        theirs = open_clip.model.CLIP(**DESCRIPTIONS[name]).state_dict()
    theirs.pop("attn_mask", None)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_open_clips_and_would_not_be_with_the_other_activation(name):
    description = json.loads(json.dumps(DESCRIPTIONS[name]))
    is_resnet = isinstance(description["vision_cfg"]["layers"], list)
    description["vision_cfg"] |= {"layers": [1, 1, 1, 1] if is_resnet else 2}
    description["vision_cfg"]["image_size"] = 2 * (description["vision_cfg"]["patch_size"] or 32)
    description["text_cfg"] |= {"layers": 2, "vocab_size": 100, "context_length": 12}
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**description).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "c_fc.weight" in key:
                parameter.mul_(4)  # where the two activations are furthest apart
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {k: v for k, v in theirs.state_dict().items() if k != "attn_mask"}
    config = from_open_clip(description)
    ours = build_model(dict(weights), config)
    other = "gelu" if config.activation == "quick_gelu" else "quick_gelu"
    wrong = build_model(dict(weights), replace(config, activation=other))
    side = config.image_resolution
    images = torch.randn(3, 3, side, side)
    tokens = torch.randint(1, 98, (3, 12))
    tokens[:, 7] = 99
    with torch.no_grad():
        expected = theirs.encode_text(tokens)
        torch.testing.assert_close(ours.encode_text(tokens), expected, atol=1e-4, rtol=1e-4)
        assert (wrong.encode_text(tokens) - expected).abs().max() > 1e-2
        expected = theirs.encode_image(images)
        torch.testing.assert_close(ours.encode_image(images), expected, atol=1e-4, rtol=1e-4)
        if not is_resnet:
            assert (wrong.encode_image(images) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", sorted(DESCRIPTIONS.keys() - set(OWN)))
def test_other_models_are_refused_by_the_name_of_what_is_missing(name):
    with pytest.raises(InputError, match="|".join(OTHER)):
        from_open_clip(DESCRIPTIONS[name])


@settings(deadline=None)
@given(
    width=st.integers(1, 60).map(lambda heads: 64 * heads),
    mlp_width=st.integers(1, 20_000),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    mode=st.sampled_from(["shortest", "squash"]),
)
def test_our_description_survives_the_way_to_open_clips_and_back(width, mlp_width, mean, mode):
    config = Config(
        embed_dim=8, image_resolution=32, vision_layers=2, vision_width=width, vision_patch_size=16,
        vision_mlp_width=mlp_width, transformer_width=width, transformer_mlp_width=mlp_width,
        transformer_heads=1, transformer_layers=1, mean=mean, resize_mode=mode, activation="gelu",
    )  # fmt: skip
    assert from_open_clip(json.loads(json.dumps(to_open_clip(config)))) == config
