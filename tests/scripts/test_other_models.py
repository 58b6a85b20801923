"""Whole scripts with models of other libraries, whose own programs give the same scores."""

import json
import re
import shlex
import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
from definitions import by_definition
from peers import (
    save_open_clip,
    save_transformers,
    small_open_clip,
    small_transformers,
    their_features,
)
from PIL import Image
from script_runs import run_script
from transformers import CLIPModel, CLIPProcessor

from flickr8k.render_demo import render_demo
from models import load
from utils import Flickr8kDataset

pytestmark = pytest.mark.slow
PADDING = "word " * 110  # tokens before the first in which two captions differ


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With images that have to be resized and cut."""
    root = render_demo(tmp_path_factory.mktemp("data"), n_train=16, n_val=12)
    for file in root.glob("images/*"):
        Image.open(file).resize((120, 90)).save(file)
    return root


@pytest.fixture(scope="module")
def long_data(data):
    """The same images with captions of more than 110 tokens, which differ at their ends."""
    folder = shutil.copytree(data, data.parent / "long")
    for split in ("train", "val"):
        file = folder / f"en_{split}.json"
        entries = json.loads(file.read_text("utf-8"))
        for entry in entries:
            entry["caption"] = [PADDING + text for text in entry["caption"][:2]]
        file.write_text(json.dumps(entries))
    return folder


def scored(weights, data, cwd, *options):
    """The scores that utils/metric.py writes, and what it prints."""
    arguments = ["--weights", weights, "--dataset_path", data, "--json", "scores.json", *options]
    done = run_script("utils/metric.py", *arguments, cwd=cwd)
    return json.loads((cwd / "scores.json").read_text()), done.stdout


def assert_scores(found, image_features, text_features, dataset):
    """`found` are those of these features, by definition."""
    similarities = F.normalize(image_features) @ F.normalize(text_features).T
    for way, scores, truth in (
        ("i2t", similarities, dataset.img_to_txt),
        ("t2i", similarities.T, dataset.txt_to_img),
    ):
        assert found[way] == pytest.approx(by_definition(scores.numpy(), truth, range(1, 11)))


def train(start, data, cwd, *options):
    """(the weights of the best epoch, what was printed) of an epoch from these weights."""
    arguments = ["--resume_training", start, "--dataset_path", data, "--epochs", 1,
                 "--batch_size", 8, *options]  # fmt: skip
    done = run_script("train.py", *arguments, cwd=cwd)
    (weights,) = cwd.glob("logs/*/weights/best_epoch_weights.pth")
    return weights, done.stdout


def converted(weights, to, cwd):
    run_script("models/convert.py", weights, to, "--format", to, cwd=cwd)
    return cwd / to


def by_open_clip(weights, cwd, files, texts):
    """The features of image files and of texts, computed by open_clip alone."""
    place = f"local-dir:{converted(weights, 'open_clip', cwd)}"
    model, _, transform = open_clip.create_model_and_transforms(place)
    images = torch.stack([transform(Image.open(file)) for file in files])
    return their_features(model.eval(), images, open_clip.get_tokenizer(place)(texts))


def by_transformers(weights, cwd, files, texts):
    folder = converted(weights, "transformers", cwd)
    given = CLIPProcessor.from_pretrained(folder)(
        text=texts, images=[Image.open(f) for f in files], return_tensors="pt", padding=True
    )
    model = CLIPModel.from_pretrained(folder).eval()
    return their_features(model, given.pixel_values, given.input_ids)


def test_transformers_computes_the_scores_of_what_was_tuned_from_its_model(data, tmp_path):
    save_transformers(small_transformers("gelu", eos=2), tmp_path / "start")
    weights, _ = train("start", data, tmp_path)
    found, _ = scored(weights, data, tmp_path)
    dataset = Flickr8kDataset(data, is_train=False)
    for features in (by_transformers, by_open_clip):
        theirs = features(weights, tmp_path, dataset.image, list(dataset.text))
        assert_scores(found, *theirs, dataset)


def test_a_model_that_reads_248_tokens_reads_captions_whole(long_data, tmp_path):
    """Cut at 77 tokens, all captions would be the same."""
    save_open_clip(*small_open_clip(context=248), tmp_path / "start")
    weights, printed = train("start", long_data, tmp_path)
    assert "were cut" not in printed and "belong to several images" not in printed
    found, _ = scored(weights, long_data, tmp_path)
    dataset = Flickr8kDataset(long_data, is_train=False, plain_protocol=True)
    features = by_open_clip(weights, tmp_path, dataset.image, list(dataset.text))
    assert_scores(found, *features, dataset)

    image, texts = dataset.image[0], [PADDING + end for end in ("a red star", "two boats")]
    done = run_script("predict_zero_shot.py", image, "--weights", weights, "--labels", *texts,
                      cwd=tmp_path)  # fmt: skip
    shutil.rmtree(tmp_path / "open_clip")
    of_image, of_texts = map(F.normalize, by_open_clip(weights, tmp_path, [image], texts))
    scale = load(weights, "cpu")[0].logit_scale.exp().item()
    expected = (scale * of_image @ of_texts.T).softmax(dim=1)[0].tolist()
    printed = re.search(r"\[\[(.*)\]\]", done.stdout)[1].split()
    assert [float(p) for p in printed] == pytest.approx(expected, rel=1e-3)
    assert abs(expected[0] - 0.5) > 1e-3
    done = run_script("predict.py", image, "--weights", weights, "--text", *texts, cwd=tmp_path)
    shown = sorted(float(p) for p in re.findall(r"^\d\.\s+([\d.]+)%", done.stdout, re.MULTILINE))
    assert shown == pytest.approx(sorted(100 * p for p in expected), abs=0.02)


def test_a_model_that_reads_42_tokens_is_given_no_more(data, tmp_path):
    """The captions differ at their starts, and none fits."""
    long_data = shutil.copytree(data, tmp_path / "data")
    for file in long_data.glob("en_*.json"):
        entries = json.loads(file.read_text("utf-8"))
        for entry in entries:
            entry["caption"] = [f"{text} {PADDING}" for text in entry["caption"][:2]]
        file.write_text(json.dumps(entries))
    save_open_clip(*small_open_clip(context=42), tmp_path / "start")
    _, printed = train("start", long_data, tmp_path)
    assert "are longer than the 42 tokens that the model reads, and were cut" in printed
    for line in printed.partition("now try\n")[2].splitlines()[:2]:
        _, script, *arguments = shlex.split(line)
        run_script(script, *arguments, cwd=tmp_path)
