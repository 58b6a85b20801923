"""What train.py's arguments are where the command line leaves them open."""

import os
import sys
from contextlib import nullcontext

import pytest

from flickr8k.render_demo import render_demo
from models.errors import InputError
from models.weights.registry import CONFIGS
from train import build_parser
from utils.training.settings import (
    as_saved,
    check_arguments,
    fine_tuning_rate,
    how_it_goes_on,
    lacks_demo_set,
    resolve_arguments,
    resolve_rate,
    without_effect,
)


def settled(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    parser = build_parser()
    args, resumed = resolve_arguments(parser, parser.parse_args())
    assert resumed is None
    return args


def test_fine_tuning_mixes_and_stops_unless_it_is_told_otherwise(monkeypatch):
    args = settled(monkeypatch)
    assert (args.distill, args.epochs, args.patience) == (0, 10, 3)
    assert args.lr is None and args.warmup_epochs is None  # they follow the model and the steps
    assert args.wise_ft[0] == 0 and args.wise_ft[-1] == 1
    args = settled(monkeypatch, "--distill", "6", "--wise_ft", "1", "--lr", "1e-5")
    assert (args.distill, args.wise_ft, args.lr) == (6, [1.0], 1e-5)


def test_data_to_distil_on_asks_for_distillation(monkeypatch):
    assert settled(monkeypatch, "--distill_data", "scans").distill == 6
    assert settled(monkeypatch, "--distill_data", "scans", "--distill", "2").distill == 2
    with pytest.raises(InputError, match="--distill_data"):
        check_arguments(settled(monkeypatch, "--distill_data", "scans", "--distill", "0"))


def test_from_scratch_there_is_nothing_to_keep(monkeypatch):
    args = settled(monkeypatch, "--resume_training", "none", "--model", "ViT-B/32")
    assert (args.distill, args.wise_ft, args.lr) == (None, None, 5e-4)
    assert (args.epochs, args.patience) == (20, None)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--optimizer_type", "sgd"], "give --lr"),
        (["--max_forgetting", "3"], "--retention"),
        (
            ["--log_dir", "a_file/logs"],
            "--log_dir a_file/logs: cannot be written",
        ),
        (
            ["--resume_training", "none", "--model", "ViT-demo", "--activation", "gelu"],
            "--activation",
        ),
        (["--cache", "a_file"], "a_file: cannot be written"),
        (
            ["--resume_training", "logs/a"],
            "--resume_training logs/a/weights/best_epoch_weights.pth",
        ),
        (["--resume_training", "logs/<run>"], "logs/<run>: neither a file nor"),
        (["--demo", "--dataset_path", "mine"], "leave --demo out"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "en_train.csv").touch()
    for time, name in enumerate(("a", "b")):
        weights = tmp_path / "logs" / name / "weights"
        weights.mkdir(parents=True)
        (weights / "best_epoch_weights.pth").touch()
        os.utime(weights.parent, (time, time))
    with pytest.raises(InputError) as error:
        args = settled(monkeypatch, *arguments)
        if args.demo:
            lacks_demo_set(args.dataset_path, args.language)
        check_arguments(args)
    assert named in str(error.value).replace(os.sep, "/") and "\n" not in str(error.value)


def test_max_forgetting_without_sets_is_refused_when_a_run_goes_on(monkeypatch):
    saved = as_saved(settled(monkeypatch), None)
    resumed = {"arguments": saved, "start": None, "rows": [], "losses": []}
    monkeypatch.setattr("utils.training.settings.read_resumed", lambda *_: resumed)
    for given, is_refused in (("2", False), ("3", True)):
        monkeypatch.setattr(sys, "argv", ["train.py", "--max_forgetting", given])
        parser = build_parser()
        with pytest.raises(InputError, match="--retention") if is_refused else nullcontext():
            resolve_arguments(parser, parser.parse_args())


def test_the_demo_goes_into_empty_folders_and_stays_in_its_own(monkeypatch, tmp_path):
    for folder, is_rendered in (("new", True), ("empty", True), ("demo", True)):
        (tmp_path / "empty").mkdir(exist_ok=True)
        args = settled(monkeypatch, "--demo", "--dataset_path", str(tmp_path / folder))
        assert lacks_demo_set(args.dataset_path, args.language) == is_rendered
    render_demo(tmp_path / "demo", seed=3, n_train=2, n_val=2)
    assert not lacks_demo_set(args.dataset_path, args.language)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--ema", "0.9999"], "about 10,000 steps, and this run has 80"),
        (["--ema", "0.98"], None),
        (["--grad_cache", "100"], "--grad_cache 100 has no effect: a process has 64 images a step"),
        (["--grad_cache", "63"], None),
        (["--lora", "8", "--lock_text", "2"], "only low-rank changes learn"),
        (["--lora", "8", "--lock_text"], None),
        (["--resume_training", "none", "--model", "ViT-demo", "--lock_image"], "random weights"),
    ],
)
def test_arguments_without_effect_are_told(monkeypatch, arguments, named):
    """Of a run of 10 epochs with 8 steps each."""
    lines = list(without_effect(settled(monkeypatch, *arguments), 8))
    assert [named in line for line in lines] == [True] if named else not lines


@pytest.mark.parametrize(
    "arguments, lines",
    [
        ([], ["the run goes on with epoch 3 of 10, of which 4 steps are done"]),
        (["--num_workers", "2"], [..., "changed: --num_workers None -> 2"]),
        (["--weight_decay", "0.5", "--freq", "2"],
         [..., "changed: --weight_decay 0.1 -> 0.5; --freq 5 -> 2, so that its result is not that "
          "of an uninterrupted run"]),
        (["--log_dir", "x"], [..., "--log_dir has no effect: a run goes on in its own folder"]),
        (["--epochs", "2", "--warmup_epochs", "1"],
         ["changed: --epochs 10 -> 2; --warmup_epochs None -> 1.0, so that its result is not that "
          "of an uninterrupted run"]),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_tells_what_is_not_as_it_was(monkeypatch, arguments, lines):
    before = as_saved(settled(monkeypatch), None)
    resumed = {"rows": [{}, {}], "losses": [1.0] * 4, "arguments": before}
    found = list(how_it_goes_on(settled(monkeypatch, *arguments), resumed))
    assert len(found) == len(lines)
    assert all(line in (..., own) for own, line in zip(found, lines, strict=True))


PUBLISHED = [  # model, images a step, rate with which the authors report a gain
    ("ViT-B/16", 64, 1e-5),  # Image-Contrastive-CLIP on Flickr8k
    ("RN50", 256, 1e-5),  # ITRA on COCO
    ("ViT-L/14@336px", 256, 1e-5),  # UPop on Flickr30k and COCO (Shi et al. 2023)
    ("ViT-B/16", 512, 1e-5),  # FLYP (Goyal et al. 2023)
    ("ViT-B/16", 512, 3e-5),  # WiSE-FT (Wortsman et al. 2022)
    ("OFA-Sys/chinese-clip-vit-base-patch16", 1024, 5e-5),  # Flickr30K-CN (Yang et al. 2022)
]


@pytest.mark.parametrize("model, batch_size, published", PUBLISHED)
def test_the_rate_is_within_a_factor_of_three_of_published_ones(model, batch_size, published):
    config = CONFIGS.get(model, CONFIGS["ViT-B/16"])  # Chinese-CLIP has towers of the same width
    assert 1 / 3 <= fine_tuning_rate(config, batch_size) / published <= 3


def test_the_rate_follows_width_and_batch_up_to_a_limit():
    assert fine_tuning_rate(CONFIGS["ViT-B/32"], 64) == 1e-5
    assert fine_tuning_rate(CONFIGS["ViT-B/32"], 256) == 2e-5
    assert fine_tuning_rate(CONFIGS["ViT-L/14"], 64) == 7.5e-6
    assert fine_tuning_rate(CONFIGS["RN50x4"], 64) == 3e-6  # 2,560 channels in the last stage
    assert fine_tuning_rate(CONFIGS["ViT-demo"], 1024) == 5e-5


def test_changes_of_low_rank_have_a_rate_of_their_own(monkeypatch):
    for model in ("ViT-B/32", "ViT-L/14"):
        assert resolve_rate(settled(monkeypatch, "--lora", "8"), CONFIGS[model]).lr == 2e-4
