"""Chinese captions and Chinese models, through the scripts as a user starts them."""

import re
import shlex
from argparse import Namespace

import pytest
import torch
from script_runs import ROOT, error_line, run_script
from tiny import NAMED

from flickr8k.render_demo import render_demo
from models import load
from models.clip_utils import create_model
from train import build_parser
from utils import Flickr8kDataset
from utils.training.progress import tokenizer_warning
from utils.training.settings import resolve_arguments

DEMO = ["--resume_training", "none", "--model", "cn-tiny", "--language", "cn"]
MODEL = "OFA-Sys/chinese-clip-vit-base-patch16"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=40, n_val=10)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(run folder, what was printed) of an epoch from scratch on Chinese captions."""
    work = tmp_path_factory.mktemp("work")
    words = ["--dataset_path", data, "--batch_size", 8, "--epochs", 1, "--save_steps", 2]
    done = run_script("train.py", *DEMO, *words, cwd=work)
    return next((work / "logs").iterdir()), done.stdout


@pytest.mark.slow
def test_a_chinese_model_is_trained_and_used_by_every_script(trained, data, tmp_path):
    run, printed = trained
    assert "warning" not in printed and "were cut" not in printed
    *_, label, other = shlex.split(printed.splitlines()[-3])  # what to try, before the page
    labels = label, other
    assert re.fullmatch("[\u4e00-\u9fff，。]+", label)  # from the Chinese captions
    image = next((data / "images").glob("val_*.png"))
    answer = run_script("predict_zero_shot.py", image, "--weights", run, "--labels", *labels,
                        cwd=tmp_path).stdout  # fmt: skip
    assert all(f"({label!r}, " in answer for label in labels)
    ranked = run_script("predict.py", image, "--weights", run, "--text", *labels, cwd=tmp_path)
    assert all(label in ranked.stdout for label in labels)
    scores = run_script("utils/metric.py", "--weights", run, cwd=tmp_path).stdout
    best = load(run, "cpu")[0]
    assert best.config == NAMED["cn-tiny"] and "10 images, 50 captions" in scores


@pytest.mark.slow
def test_a_run_of_a_chinese_model_goes_on(trained, tmp_path):
    run, _ = trained
    done = run_script("train.py", "--resume_training", run, "--epochs", 2, cwd=tmp_path)
    assert " 2/2 " in done.stdout and " 1/2 " not in done.stdout
    assert load(run / "weights" / "checkpoint.pth", "cpu")[0].config == NAMED["cn-tiny"]


@pytest.mark.slow
def test_a_chinese_model_is_fine_tuned_with_what_keeps_and_saves(trained, data, tmp_path):
    """Both languages, a locked tower but for a block, chunks of a batch, less memory, mixtures."""
    run, _ = trained
    best = run / "weights" / "best_epoch_weights.pth"
    words = ["--resume_training", best, "--dataset_path", data, "--language", "en", "cn",
             "--batch_size", 8, "--epochs", 1, "--lock_text", 1, "--grad_cache", 4,
             "--grad_checkpointing", "--wise_ft", 0, 1]  # fmt: skip
    done = run_script("train.py", *words, cwd=tmp_path)
    assert "before training" in done.stdout and "WiSE-FT" in done.stdout
    (tuned,) = (tmp_path / "logs").iterdir()
    start, end = (
        load(tuned / "weights" / f"{name}_weights.pth", "cpu")[0].state_dict()
        for name in ("start", "last_epoch")
    )
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    text = {key for key in moved if key.startswith("bert.")}
    assert text and all(key.startswith("bert.encoder.layer.1.") for key in text)
    assert "visual.conv1.weight" in moved and "text_projection" in moved


def test_the_demo_in_chinese_takes_the_chinese_model():
    for words, model in [
        (["--language", "cn"], "cn-demo"),
        (["--language", "en", "cn"], "ViT-demo"),
        (["--language", "cn", "--model", "ViT-demo"], "ViT-demo"),
    ]:
        parser = build_parser()
        defaults = parser.parse_args([])
        given = parser.parse_args(["--demo", *words], Namespace(**dict.fromkeys(vars(defaults))))
        args, _ = resolve_arguments(given, defaults)
        assert (args.model, args.resume_training, args.lr) == (model, "none", 5e-4)


@pytest.mark.parametrize(
    ("model", "language", "is_told"),
    [
        ("cn-demo", "cn", False),
        ("cn-demo", ["en", "cn"], False),
        ("ViT-demo", "en", False),
        ("ViT-demo", "cn", True),
        ("ViT-demo", ["en", "cn"], True),
    ],
)
def test_captions_that_the_tokenizer_takes_to_pieces_are_told(data, model, language, is_told):
    warning = tokenizer_warning(Flickr8kDataset(data, language=language, model=create_model(model)))
    assert (f"for Chinese {MODEL}" in warning) if is_told else (warning is None)


def test_a_chinese_tokenizer_does_not_fit_photographs_in_english(data):
    """Their captions have more words that it does not have whole than the demo's."""
    model = create_model("cn-demo")
    dataset = Flickr8kDataset(data, model=model)
    dataset.text = ["Kids splash in the muddy puddles .", "A motorcyclist wearing sunglasses ."]
    assert "for English ViT-B/32" in tokenizer_warning(dataset)
    other = Flickr8kDataset(data, model=model)
    other.text = ["ᚠᚡᚢ ᚠᚢᚡ ᚡᚢ"]  # runes, none of which its vocabulary has
    assert "100% of the captions' tokens are parts of words or unk" in tokenizer_warning(other)


@pytest.mark.parametrize("labels", [["一只狗", "一只 狗"], ["A dog", "a  DOG"]])
def test_labels_that_are_the_same_to_the_chinese_tokenizer_are_refused(trained, labels, tmp_path):
    words = [ROOT / "R_mAP.png", "--weights", trained[0], "--labels", *labels]
    line = error_line("predict_zero_shot.py", *words, cwd=tmp_path)
    assert f"--labels: {labels[1]!r} repeats {labels[0]!r}" in line
