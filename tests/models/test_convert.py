"""Converted weights, opened by the programs that they are for."""

import open_clip
import pytest
import torch
from PIL import Image
from script_runs import ROOT, error_line, run_script
from transformers import CLIPModel, CLIPProcessor

from models import load, tokenize
from models.clip_utils import create_model
from models.preprocess import open_image
from utils.runs.checkpoint import save_weights

CAPTIONS = ["a red bird on a fence", "两只狗", "It's 10 o'clock, all's well!"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best_epoch_weights.pth"
    save_weights(create_model("ViT-demo"), path)
    return path


@pytest.fixture
def ours(weights):
    model, preprocess = load(weights, "cpu")
    images = torch.stack([preprocess(open_image(ROOT / "R_mAP.png"))] * 2)
    with torch.no_grad():
        return model, images, model.encode_image(images), model.encode_text(tokenize(CAPTIONS))


def test_open_clip_opens_it_and_we_do_again(weights, ours, tmp_path):
    model, images, image_features, text_features = ours
    run_script("models/convert.py", weights, "out", "--format", "open_clip", cwd=tmp_path)
    path = tmp_path / "out"
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    theirs.eval()
    with Image.open(ROOT / "R_mAP.png") as image, torch.no_grad():
        assert torch.equal(transform(image.convert("RGB")), images[0])
        torch.testing.assert_close(
            theirs.encode_image(images), image_features, atol=1e-4, rtol=1e-4
        )
        tokens = tokenize(CAPTIONS)
        torch.testing.assert_close(theirs.encode_text(tokens), text_features, atol=1e-4, rtol=1e-4)
    back, _ = load(path, "cpu")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[k], t) for k, t in model.state_dict().items())


def test_transformers_opens_it_and_we_do_again(weights, ours, tmp_path):
    model, images, image_features, text_features = ours
    run_script("models/convert.py", weights, "out", "--format", "transformers", cwd=tmp_path)
    path = tmp_path / "out"
    theirs, processor = CLIPModel.from_pretrained(path).eval(), CLIPProcessor.from_pretrained(path)
    with Image.open(ROOT / "R_mAP.png") as image:
        given = processor(
            text=CAPTIONS, images=[image.convert("RGB")] * 2, return_tensors="pt", padding=True
        )
    own = tokenize(CAPTIONS)
    for row, mask, expected in zip(given.input_ids, given.attention_mask, own, strict=True):
        assert row[mask.bool()].tolist() == expected[: expected.argmax() + 1].tolist()
    with torch.no_grad():
        for found, expected in [
            (theirs.get_image_features(images), image_features),
            (theirs.get_text_features(own), text_features),
        ]:
            features = getattr(found, "pooler_output", found)
            torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    back, _ = load(path, "cpu")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[k], t) for k, t in model.state_dict().items())


def test_nothing_is_overwritten_and_no_half_is_left(weights, tmp_path):
    (tmp_path / "out").mkdir()
    arguments = [weights, "out", "--format", "open_clip"]
    line = error_line("models/convert.py", *arguments, cwd=tmp_path)
    assert "out: exists already" in line
    save_weights(create_model("RN50", 32), tmp_path / "resnet.pth")
    arguments = ["resnet.pth", "new", "--format", "transformers"]
    line = error_line("models/convert.py", *arguments, cwd=tmp_path)
    assert "no CLIP with a ResNet" in line
    assert {path.name for path in tmp_path.iterdir()} == {
        "out", "resnet.pth", "open_clip_config.json"
    }  # fmt: skip
