"""The benchmark on photographs: its splits, the recipe beside ours, what is run anew."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from PIL import Image
from script_runs import ROOT

from flickr8k.render_demo import render_demo
from models import tokenize
from models.clip_utils import create_model
from utils.data.annotations import read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.runs.checkpoint import save_weights

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import photographs
import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=60, n_val=8)


@given(st.lists(st.integers(), unique=True))
def test_split_is_disjoint_and_complete(entries):
    pretraining, fine_tuning_part = photographs.split(entries)
    assert sorted(pretraining + fine_tuning_part) == sorted(entries)
    assert len(fine_tuning_part) == len(entries) // 6


@pytest.mark.parametrize("links", [True, False])
def test_splits_are_data_sets_that_share_images(data, tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(photographs.Path, "symlink_to", raise_os_error)
    for _ in range(2):  # the second time all is there
        photographs.make_splits(data, tmp_path)
    sets = {
        (name, is_train): [*read_annotations(tmp_path / name / f"en_{split}.json")]
        for name in ("pretrain", "finetune", "retention")
        for split, is_train in (("train", True), ("val", False))
    }
    everything = read_annotations(data / "en_train.json")
    choosing = sets["finetune", False]
    parts = sets["pretrain", True] + sets["finetune", True] + choosing
    assert sorted(parts) == sorted(everything) and choosing
    assert [entry for entry in sets["retention", False] if entry in sets["finetune", True]] == []
    assert all(entry in sets["pretrain", True] for entry in sets["retention", False])
    assert sets["pretrain", False] == choosing
    test = read_annotations(tmp_path / "finetune" / "en_test.json")
    assert test == read_annotations(data / "en_val.json")
    image, _ = Flickr8kDataset(tmp_path / "finetune", 32)[0]
    assert image.shape == (3, 32, 32)


def raise_os_error(*_, **__):
    raise OSError("no links here")


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (90, 30)])
def test_letterbox_keeps_the_aspect_on_grey(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    side = 60
    scale = side / max(size)
    width, height = (round(length * scale) for length in size)
    expected = Image.new("RGB", (side, side), (128, 128, 128))
    left, top = round((side - width) / 2), round((side - height) / 2)
    expected.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, top))
    letterboxed = photographs.letterboxed(side)(image)
    torch.testing.assert_close(letterboxed.permute(1, 2, 0), torch.tensor(np.array(expected)) / 255)


def test_rate_is_constant_then_torchs_cosine():
    steps = 40
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=0.01)
    expected = [1.0] * steps
    for _ in range(steps + 1):
        expected += cosine.get_last_lr()
        optimizer.step()
        cosine.step()
    rates = [photographs.followed_rate(step / (2 * steps)) for step in range(2 * steps + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_loss_of_the_followed_recipe_is_open_clips():
    model = create_model("ViT-demo")
    images, tokens = torch.randn(5, 3, 64, 64), tokenize(["a", "b c", "d", "e f g", "h"])
    features = (
        torch.nn.functional.normalize(features, dim=-1)
        for features in (model.encode_image(images), model.encode_text(tokens))
    )
    expected = ClipLoss()(*features, model.logit_scale.exp())
    torch.testing.assert_close(photographs.pair_loss(model, images, tokens), expected)


def test_followed_recipe_keeps_the_epoch_with_the_lowest_loss(data, tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "EPOCHS", 3)
    monkeypatch.setitem(photographs.FOLLOWED, "batch_size", 2)
    monkeypatch.setitem(photographs.FOLLOWED, "lr", 1e-3)  # the loss goes up and down
    photographs.make_splits(data, tmp_path)
    losses, of_loss = [], photographs.validation_loss
    monkeypatch.setattr(photographs, "validation_loss",
                        lambda *args: losses.append(of_loss(*args)) or losses[-1])  # fmt: skip
    model = create_model("ViT-demo")
    photographs.fine_tune_followed(model, tmp_path, 0, None)
    validation = photographs.evaluation_sets(tmp_path, model.preprocess)["validation"]
    assert len(losses) == 3
    assert of_loss(model, validation) == pytest.approx(min(losses), rel=1e-5)


def test_recipes_are_scored_and_not_run_again(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(photographs, "EPOCHS", 1)
    monkeypatch.setitem(photographs.FOLLOWED, "batch_size", 2)
    photographs.make_splits(data, tmp_path)
    monkeypatch.setattr(photographs, "pretrain", lambda *_: tmp_path / "weights.pth")
    save_weights(create_model("ViT-demo"), tmp_path / "weights.pth")
    names = ("before", "before, as followed", "normalised")
    results = {name: [photographs.scores_of(tmp_path, name, 0)] for name in names}
    assert results["before"] != results["before, as followed"]  # not normalised
    assert results["before"][0].keys() == {"validation", "test", "retention"}
    (tmp_path / "weights.pth").unlink()
    assert photographs.scores_of(tmp_path, "normalised", 0) == results["normalised"][0]
    photographs.print_results(results)
    assert "| normalised" in capsys.readouterr().out


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5))
def test_mean_and_deviation_are_numpys(values):
    printed = [float(number) for number in runs.over_seeds(values).split(" ± ")]
    np.testing.assert_allclose(printed, [np.mean(values), np.std(values, ddof=1)], atol=0.0051)


def test_training_starts_goes_on_and_is_not_repeated(tmp_path, monkeypatch):
    called = []
    run = tmp_path / "run"

    def call(*command):
        called.append(list(map(str, command[1:])))
        (run / "weights").mkdir(parents=True, exist_ok=True)
        name = "weights/checkpoint.pth" if len(called) == 1 else "R_mAP.png"
        (run / name).touch()

    monkeypatch.setattr(runs, "call", call)
    with pytest.raises(StopIteration):  # broken off: a checkpoint, but not the last file
        runs.train(tmp_path, "--epochs", 3)
    for _ in range(2):
        assert runs.train(tmp_path, "--epochs", 3) == run
    assert called[0][:2] == ["--epochs", "3"]
    assert called[1][:2] == ["--resume_training", str(run / "weights" / "checkpoint.pth")]
    assert len(called) == 2
