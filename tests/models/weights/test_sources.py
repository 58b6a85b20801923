"""Weights with their description, from the files and folders that other libraries write."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.model import set_model_preprocess_cfg
from open_clip.push_to_hf_hub import save_for_hf
from safetensors.torch import save_file
from script_runs import error_line
from transformers import CLIPConfig, CLIPModel

from models import load
from models.clip_utils import create_model, find_weights
from models.errors import InputError
from models.weights.unwrap import unwrap
from utils.runs.checkpoint import save_weights

TEXT = {"context_length": 20, "vocab_size": 500, "width": 128, "heads": 4, "layers": 2}
VISION = {"image_size": 64, "layers": 2, "width": 160, "head_width": 80, "patch_size": 16}
DESCRIPTION = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}
PREPROCESS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3), "interpolation": "bilinear",
              "resize_mode": "squash"}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """open_clip's GELU model with heads of width 80."""
    torch.manual_seed(0)
    return open_clip.model.CLIP(**DESCRIPTION).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """As open_clip saves it for a hub."""
    path = tmp_path_factory.mktemp("open_clip") / "model"
    set_model_preprocess_cfg(theirs, PREPROCESS)
    no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    save_for_hf(theirs, no_tokenizer, DESCRIPTION, path)
    return path


@pytest.fixture(scope="module")
def transformers_model():
    text = {"hidden_size": 128, "intermediate_size": 300, "num_attention_heads": 4,
            "num_hidden_layers": 2, "max_position_embeddings": 20, "vocab_size": 500,
            "hidden_act": "gelu", "eos_token_id": 499}  # fmt: skip
    vision = {"hidden_size": 160, "intermediate_size": 500, "num_attention_heads": 2,
              "num_hidden_layers": 3, "image_size": 64, "patch_size": 16,
              "hidden_act": "gelu"}  # fmt: skip
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)).eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 490, (3, 20), generator=generator)
    tokens[:, 9] = 499
    return torch.randn(3, 3, 64, 64, generator=generator), tokens


def assert_same(model, images, texts):
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(inputs()[0]), images, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.encode_text(inputs()[1]), texts, atol=1e-4, rtol=1e-4)


def test_a_folder_of_open_clip_gives_its_features_and_preprocessing(theirs, folder):
    model, preprocess = load(folder, "cpu")
    images, tokens = inputs()
    with torch.no_grad():
        assert_same(model, theirs.encode_image(images), theirs.encode_text(tokens))
    assert {field: getattr(preprocess, field) for field in PREPROCESS} == PREPROCESS
    assert preprocess.side == 64 and model.context_length == 20
    one_file, _ = load(folder / "open_clip_pytorch_model.bin", "cpu")
    for key, tensor in model.state_dict().items():
        assert torch.equal(one_file.state_dict()[key], tensor)


@pytest.mark.parametrize("size", ["5GB", "500KB"])
def test_a_folder_of_transformers_gives_its_features(transformers_model, tmp_path, size):
    """In one file, and in several with an index."""
    transformers_model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "500KB")
    images, tokens = inputs()
    with torch.no_grad():
        found = [transformers_model.get_image_features(images),
                 transformers_model.get_text_features(tokens)]  # fmt: skip
    expected = [getattr(features, "pooler_output", features) for features in found]
    assert_same(load(tmp_path, "cpu")[0], *expected)
    if size == "500KB":
        next(tmp_path.glob("*-00002-*.safetensors")).unlink()
        with pytest.raises(InputError, match=r"part model-00002-of-\d+\.safetensors is missing"):
            load(tmp_path, "cpu")


def test_a_state_dict_alone_asks_for_its_activation_and_takes_it(theirs, tmp_path):
    theirs = open_clip.model.CLIP(
        48, VISION | {"width": 128, "head_width": 64}, TEXT | {"heads": 2}
    ).eval()
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(InputError, match=r"bare\.pt: .*--activation: quick_gelu for .*OpenAI"):
        load(tmp_path / "bare.pt", "cpu")
    images, tokens = inputs()
    model, _ = load(tmp_path / "bare.pt", "cpu", activation="gelu")
    with torch.no_grad():
        assert_same(model, theirs.encode_image(images), theirs.encode_text(tokens))


@settings(deadline=None)
@given(
    prefix=st.lists(
        st.sampled_from(["module.", "_orig_mod.", "model.", "clip_model."]), max_size=4
    ),
    wrappers=st.lists(st.text(min_size=1, max_size=9), max_size=4),
)
def test_prefixes_and_wrappers_are_taken_off(prefix, wrappers):
    weights = {"ln_final.weight": torch.zeros(2), "visual.proj": torch.ones(3)}
    content = {f"{''.join(prefix)}{key}": tensor for key, tensor in weights.items()}
    content |= {"loss.weight": torch.zeros(1)} if prefix else {}
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    assert unwrap(content).keys() == weights.keys()


def test_two_models_in_a_file_are_listed():
    weights = {"ln_final.weight": torch.zeros(2)}
    with pytest.raises(InputError, match=r"2 CLIP models \(ema, state_dict\.module\)"):
        unwrap({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "ema": dict(weights)})


def spoilt(folder, tmp_path, change):
    """A copy of open_clip's folder, changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    weights = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    content = json.loads((folder / "open_clip_config.json").read_text())
    change(copy, content, weights)
    return copy


def written(copy, content, weights):
    save_file(weights, copy / "open_clip_model.safetensors")
    (copy / "open_clip_config.json").write_text(json.dumps(content))


WRONG = {
    "empty folder": (lambda copy, c, w: None, "a folder without weights"),
    "no weights": (lambda copy, c, w: written(copy / "..", c, w), "a folder without weights"),
    "broken json": (
        lambda copy, c, w: (written(copy, c, w), (copy / "open_clip_config.json").write_text("{")),
        "open_clip_config.json: broken JSON",
    ),
    "a list": (lambda copy, c, w: written(copy, [c], w), "should hold the description"),
    "another depth": (
        lambda copy, c, w: c["model_cfg"]["text_cfg"].update(layers=3) or written(copy, c, w),
        r"missing: transformer\.resblocks\.2",
    ),
    "another width": (
        lambda copy, c, w: c["model_cfg"]["vision_cfg"].update(mlp_ratio=2) or written(copy, c, w),
        "wrongly shaped",
    ),
    "a text as width": (
        lambda copy, c, w: c["model_cfg"].update(embed_dim="48") or written(copy, c, w),
        "its embed_dim would be '48'",
    ),
    "no text tower": (
        lambda copy, c, w: c["model_cfg"].pop("text_cfg") and written(copy, c, w),
        "text_cfg",
    ),
    "another tower": (
        lambda copy, c, w: (
            c["model_cfg"]["vision_cfg"].update(timm_model_name="vit_base") or written(copy, c, w)
        ),
        "timm_model_name",
    ),
    "another tokenizer": (
        lambda copy, c, w: (
            c["model_cfg"]["text_cfg"].update(hf_tokenizer_name="google/mt5-base")
            or written(copy, c, w)
        ),
        "hf_tokenizer_name",
    ),
    "a wrong mean": (
        lambda copy, c, w: c["preprocess_cfg"].update(mean=[0.5]) or written(copy, c, w),
        r"its mean would be \(0\.5,\)",
    ),
    "an unknown resize": (
        lambda copy, c, w: c["preprocess_cfg"].update(resize_mode="longest") or written(copy, c, w),
        "its resize_mode would be 'longest'",
    ),
    "heads of no width": (
        lambda copy, c, w: c["model_cfg"]["vision_cfg"].update(head_width=0) or written(copy, c, w),
        "head_width|not a CLIP model",
    ),
    "one tower's weights": (
        lambda copy, c, w: written(copy, c, {k: v for k, v in w.items() if "visual" not in k}),
        "missing: visual",
    ),
    "weights as config": (
        lambda copy, c, w: (copy / "open_clip_model.safetensors").write_text(json.dumps(c)),
        "not weights|truncated|damaged",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_folder_that_is_wrong_is_refused_in_one_line(folder, tmp_path, name):
    change, message = WRONG[name]
    copy = spoilt(folder, tmp_path, change)
    with pytest.raises(InputError, match=message) as error:
        load(copy, "cpu")
    assert str(copy) in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_folder_ends_a_script_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    line = error_line("predict_zero_shot.py", "--weights", "empty", cwd=tmp_path)
    assert "empty: a folder without weights" in line


def test_the_folder_of_a_run_stands_for_its_best_weights(tmp_path):
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    save_weights(create_model("ViT-demo"), weights / "best_epoch_weights.pth")
    assert find_weights(tmp_path / "run") == weights / "best_epoch_weights.pth"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "broken JSON"), ("[1]", "should hold the description"), ('{"embed_dim": 1}', "vision")],
)
def test_a_damaged_description_inside_safetensors_is_named(theirs, tmp_path, text, complaint):
    path = tmp_path / "strange.safetensors"
    save_file(theirs.state_dict(), path, metadata={"open_clip_config.json": text})
    with pytest.raises(InputError, match=rf"strange\.safetensors: its .*{complaint}"):
        load(path, "cpu")
