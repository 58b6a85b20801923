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
    without_effect,
)


def settled(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    parser = build_parser()
    args, resumed = resolve_arguments(parser, parser.parse_args())
    assert resumed is None
    return args


def test_fine_tuning_keeps_and_mixes_unless_it_is_told_otherwise(monkeypatch):
    args = settled(monkeypatch)
    assert args.distill > 0 and args.lr is None  # which follows the model
    assert args.wise_ft[0] == 0 and args.wise_ft[-1] == 1
    assert args.warmup_epochs == min(1, args.epochs / 10)
    for epochs, warmup in ((4, 0.4), (30, 1)):  # a tenth of the run, and at most an epoch
        assert settled(monkeypatch, "--epochs", str(epochs)).warmup_epochs == warmup
    args = settled(monkeypatch, "--distill", "0", "--wise_ft", "1", "--lr", "1e-5")
    assert (args.distill, args.wise_ft, args.lr) == (0, [1.0], 1e-5)


def test_from_scratch_there_is_nothing_to_keep(monkeypatch):
    args = settled(monkeypatch, "--resume_training", "none", "--model", "ViT-B/32")
    assert (args.distill, args.wise_ft, args.lr) == (None, None, 5e-4)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--optimizer_type", "sgd"], "give --lr"),
        (["--max_forgetting", "3"], "--retention"),
        (
            ["--log_dir", "a_file/logs"],
            "--log_dir a_file/logs: cannot be written (a_file is no folder",
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
        (["--resume_training", "logs/<run>"], "those here are logs/b, logs/a"),
        (["--resume_training", "logs/2020"], "those here are logs/b, logs/a"),
        (["--resume_training", "logs"], "those here are logs/b, logs/a"),
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
        (["--ema", "0.9999"], "about 10,000 steps, and this run has 160"),
        (["--ema", "0.99"], None),
        (["--grad_cache", "100"], "--grad_cache 100 has no effect: a process has 64 images a step"),
        (["--grad_cache", "63"], None),
        (["--lora", "8", "--lock_text", "2"], "only low-rank changes learn"),
        (["--lora", "8", "--lock_text"], None),
        (["--resume_training", "none", "--model", "ViT-demo", "--lock_image"], "random weights"),
    ],
)
def test_arguments_without_effect_are_told(monkeypatch, arguments, named):
    """Of a run of 20 epochs with 8 steps each."""
    lines = list(without_effect(settled(monkeypatch, *arguments), 8))
    assert [named in line for line in lines] == [True] if named else not lines


@pytest.mark.parametrize(
    "arguments, lines",
    [
        ([], ["the run goes on with epoch 3 of 20, of which 4 steps are done"]),
        (["--num_workers", "2"], [..., "changed: --num_workers None -> 2"]),
        (["--weight_decay", "0.5", "--freq", "2"],
         [..., "changed: --weight_decay 0.1 -> 0.5; --freq 5 -> 2, so that its result is not that "
          "of an uninterrupted run"]),
        (["--log_dir", "x"], [..., "--log_dir has no effect: a run goes on in its own folder"]),
        (["--epochs", "2", "--warmup_epochs", "1"],
         ["changed: --epochs 20 -> 2, so that its result is not that of an uninterrupted run"]),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_tells_what_is_not_as_it_was(monkeypatch, arguments, lines):
    before = as_saved(settled(monkeypatch), None)
    resumed = {"rows": [{}, {}], "losses": [1.0] * 4, "arguments": before}
    found = list(how_it_goes_on(settled(monkeypatch, *arguments), resumed))
    assert len(found) == len(lines)
    assert all(line in (..., own) for own, line in zip(found, lines, strict=True))


def test_the_rate_falls_as_the_model_grows_wider():
    rates = {name: fine_tuning_rate(CONFIGS[name], None) for name in CONFIGS}
    assert rates["ViT-demo"] == pytest.approx(6e-4)
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "RN50", "RN50x64"):
        config = CONFIGS[name]
        width = max(config.vision_width, config.transformer_width)
        assert rates[name] * width == pytest.approx(rates["ViT-demo"] * 192, rel=0.05), name
    assert len({fine_tuning_rate(CONFIGS[name], 8) for name in CONFIGS}) == 1  # changes of low rank
