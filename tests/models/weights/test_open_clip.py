"""open_clip's descriptions: the models that they make of the same weights are the same."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip_descriptions import DESCRIPTIONS, OTHER, OWN

from models import CLIP
from models.config import Config
from models.errors import InputError
from models.weights.architecture import infer_config
from models.weights.hub import OPEN_CLIP
from models.weights.open_clip import from_open_clip, to_open_clip


def test_there_are_about_forty_models_of_open_clips_own_kind():
    assert len(OWN) == 41


@pytest.fixture(scope="module", params=OWN)
def named(request) -> tuple[str, open_clip.model.CLIP]:
    """A model of open_clip, without memory, and its name."""
    with torch.device("meta"):
        return request.param, open_clip.model.CLIP(**DESCRIPTIONS[request.param])


def test_every_model_of_its_own_kind_has_open_clips_keys_and_shapes(named):
    name, model = named
    with torch.device("meta"):
        ours = CLIP(from_open_clip(DESCRIPTIONS[name])).state_dict()
    theirs = model.state_dict()
    theirs.pop("attn_mask", None)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_shapes_tell_all_of_a_model_but_its_activation(named):
    """Also the widths of heads: no two of these models differ in nothing else."""
    name, model = named
    config = from_open_clip(DESCRIPTIONS[name])
    assert replace(infer_config(model.state_dict()), activation=config.activation) == config


def test_the_list_of_names_has_the_sizes_of_open_clips_models(named):
    architecture, model = named
    rows = [row for name, row in OPEN_CLIP.items() if name.startswith(f"{architecture}/")]
    size = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1)
    side = DESCRIPTIONS[architecture]["vision_cfg"]["image_size"]
    found = {(float(row.million_parameters), int(row.resolution)) for row in rows}
    assert found <= {(size, side)}


@pytest.mark.parametrize("name", sorted(DESCRIPTIONS.keys() - set(OWN)))
def test_other_models_are_refused_by_the_name_of_what_is_missing(name):
    with pytest.raises(InputError, match="|".join(OTHER)):
        from_open_clip(DESCRIPTIONS[name])


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
