"""What train.py's arguments are where the command line leaves them open."""

import sys

import pytest

from models.weights.registry import CONFIGS
from train import build_parser
from utils.training.settings import fine_tuning_rate, settle


def settled(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    args, resumed = settle(build_parser())
    assert resumed is None
    return args


def test_fine_tuning_keeps_and_mixes_unless_it_is_told_otherwise(monkeypatch):
    args = settled(monkeypatch)
    assert args.keep > 0 and args.lr is None  # which follows the model
    assert args.wise_ft[0] == 0 and args.wise_ft[-1] == 1
    assert args.warmup_epochs == min(1, args.epochs / 10)
    for epochs, warmup in ((4, 0.4), (30, 1)):  # a tenth of the run, and at most an epoch
        assert settled(monkeypatch, "--epochs", str(epochs)).warmup_epochs == warmup
    args = settled(monkeypatch, "--keep", "0", "--wise_ft", "1", "--lr", "1e-5")
    assert (args.keep, args.wise_ft, args.lr) == (0, [1.0], 1e-5)


def test_from_scratch_there_is_nothing_to_keep(monkeypatch):
    args = settled(monkeypatch, "--resume_training", "none", "--model", "ViT-B/32")
    assert (args.keep, args.wise_ft, args.lr) == (None, None, 5e-4)


def test_the_rate_falls_as_the_model_grows_wider():
    rates = {name: fine_tuning_rate(CONFIGS[name], None) for name in CONFIGS}
    assert rates["ViT-demo"] == pytest.approx(6e-4)
    for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "RN50", "RN50x64"):
        config = CONFIGS[name]
        width = max(config.vision_width, config.transformer_width)
        assert rates[name] * width == pytest.approx(rates["ViT-demo"] * 192, rel=0.05), name
    assert len({fine_tuning_rate(CONFIGS[name], 8) for name in CONFIGS}) == 1  # changes of low rank
