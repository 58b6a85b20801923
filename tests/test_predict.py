"""predict.py and predict_zero_shot.py, run as a user runs them."""

import ast
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from published import save_published
from scripts import ROOT, error_line, run_script

from flickr8k.render_demo import render_demo
from models import load, tokenize
from models.clip_utils import create_model
from models.preprocess import open_image
from predict_zero_shot import LABELS
from utils.checkpoint import save_weights, write_json

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a data set, and a run in logs/ that was trained on it."""
    work = tmp_path_factory.mktemp("predict")
    data = render_demo(work / "data", n_train=4, n_val=8)
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    torch.manual_seed(0)
    save_weights(create_model("ViT-demo"), weights)
    write_json(weights.parents[1] / "arguments.json", {"dataset_path": str(data), "language": "en"})
    return work


@pytest.fixture(scope="module")
def photo(work):
    return next((work / "data" / "images").glob("val_*.png"))


def test_zero_shot_prints_the_probabilities_of_the_labels(work):
    """The owner's three lines; probabilities as a softmax of the logits, computed here anew."""
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    image = ROOT / "R_mAP.png"
    done = run_script("predict_zero_shot.py", image, "--weights", weights, cwd=work)
    first, second, third = done.stdout.splitlines()

    model, preprocess = load(weights, "cpu")
    with torch.no_grad():
        logits, _ = model(preprocess(open_image(image))[None], tokenize(LABELS))
    expected = np.exp(logits[0].double().numpy())
    expected /= expected.sum()

    printed = re.fullmatch(r"Label probs: \[\[([^\[\]]*)\]\]", first)
    assert [float(p) for p in printed[1].split()] == pytest.approx(expected, rel=1e-4)
    best = int(expected.argmax())
    label, probability = second.rsplit(": ", 1)
    assert label == LABELS[best] and float(probability) == pytest.approx(expected[best], rel=1e-4)
    assert third.startswith("image 0: ")
    pairs = ast.literal_eval(third.removeprefix("image 0: "))
    order = np.argsort(-expected)
    assert [label for label, _ in pairs] == [LABELS[i] for i in order]
    assert [p for _, p in pairs] == pytest.approx(expected[order], rel=1e-4)
    for _, p in pairs:  # as float32 prints, such as 0.9547376
        assert f", {np.float32(p)!s})" in third


def test_zero_shot_reads_a_published_archive_and_labels_of_ones_own(work, photo):
    torch.manual_seed(1)
    archive = save_published(create_model("ViT-demo").state_dict(), work / "published.pt")
    odd = work / "ein Bild 图片.png"
    odd.write_bytes(photo.read_bytes())
    done = run_script(
        "predict_zero_shot.py", odd.name, "--weights", archive, "--labels", "a dog", "一只猫",
        cwd=work,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 3 and "一只猫" in done.stdout


def test_predict_ranks_the_captions_it_is_given(work, photo):
    texts = ["a dog", "a cat", "an old tree"]
    done = run_script("predict.py", photo, "--text", *texts, cwd=work)
    lines = [line for line in done.stdout.splitlines() if re.match(r"\d\. ", line)]
    model, preprocess = load(work / "logs/a run/weights/best_epoch_weights.pth", "cpu")
    with torch.no_grad():
        logits, _ = model(preprocess(open_image(photo))[None], tokenize(texts))
    probabilities = logits[0].double().softmax(0)
    expected = probabilities.argsort(descending=True).tolist()
    for place, (line, i) in enumerate(zip(lines, expected, strict=True), 1):
        assert line.startswith(f"{place}. ") and line.endswith(texts[i])
        assert f"{probabilities[i]:7.2%}" in line
    picture = work / "logs" / "a run" / "predictions" / f"{photo.stem}.png"
    assert str(picture.relative_to(work)) in done.stdout.replace(os.sep, "/")
    assert Image.open(picture).format == "PNG"


def test_predict_chooses_among_the_validation_captions_of_its_data_set(work, photo):
    done = run_script("predict.py", photo, "--output", "out/ranking.jpg", cwd=work)
    captions = [
        line.split("  ")[-1] for line in done.stdout.splitlines() if re.match(r"\d\. ", line)
    ]
    assert len(captions) == 5
    validation = (work / "data" / "en_val.json").read_text("utf-8")
    assert all(f'"{caption}"' in validation for caption in captions)
    assert Image.open(work / "out" / "ranking.jpg").format == "JPEG"


def test_predict_asks_for_images_until_an_empty_line(work, photo):
    (work / "captions.txt").write_text("a dog\n\na cat\n", encoding="utf-8")
    done = run_script(
        "predict.py", "--captions_file", "captions.txt", cwd=work,
        stdin=f"{photo}\nnowhere.png\n'{photo}'\n\n{photo}\n",
    )  # fmt: skip
    assert done.stdout.count("picture: ") == 2
    assert "nowhere.png: no such image file" in done.stdout


def test_what_cannot_be_predicted_is_named(work, photo, tmp_path):
    (work / "none.txt").write_text("\n")
    (work / "text.png").write_text("no image")
    weights = work / "logs" / "a run" / "weights" / "best_epoch_weights.pth"
    alone = tmp_path / "alone.pth"
    alone.write_bytes(weights.read_bytes())
    bad = ["--text", "a", "--output", "ranking.xyz"]
    assert "ranking.xyz" in error_line("predict.py", photo, *bad, cwd=work)
    assert "text.png" in error_line("predict.py", "text.png", "--text", "a", cwd=work)
    assert "none.txt" in error_line("predict.py", photo, "--captions_file", "none.txt", cwd=work)
    assert "--text" in error_line("predict.py", photo, "--weights", alone, cwd=work)
    assert "train.py" in error_line("predict.py", photo, cwd=tmp_path)
    assert "--labels" in error_line("predict_zero_shot.py", photo, "--labels", " ", cwd=work)
    assert "nowhere.png" in error_line("predict_zero_shot.py", "nowhere.png", cwd=work)
