"""What train.py's arguments are where the command line leaves them open."""

import os
from argparse import Namespace

import pytest

from models.errors import InputError
from models.weights.registry import CONFIGS
from train import build_parser
from utils.training.settings import (
    as_saved,
    check_arguments,
    default_rate,
    how_it_goes_on,
    resolve_arguments,
    without_effect,
)


def settled(*arguments):
    parser = build_parser()
    defaults = parser.parse_args([])
    given = parser.parse_args(arguments, Namespace(**dict.fromkeys(vars(defaults))))
    args, _ = resolve_arguments(given, defaults)
    return args


def test_fine_tuning_mixes_and_stops_unless_it_is_told_otherwise():
    args = settled()
    assert (args.distill, args.epochs, args.patience) == (0, 10, 3)
    assert args.lr is None and args.warmup_epochs is None  # they follow the model and the steps
    assert args.wise_ft[0] == 0 and args.wise_ft[-1] == 1
    args = settled("--distill", "6", "--wise_ft", "1", "--lr", "1e-5")
    assert (args.distill, args.wise_ft, args.lr) == (6, [1.0], 1e-5)


def test_data_to_distil_on_asks_for_distillation():
    assert settled("--distill_data", "scans").distill == 6
    assert settled("--distill_data", "scans", "--distill", "2").distill == 2


def test_from_scratch_there_is_nothing_to_keep():
    args = settled("--resume_training", "none", "--model", "ViT-B/32")
    assert (args.distill, args.wise_ft, args.lr) == (None, None, 5e-4)
    assert (args.epochs, args.patience) == (20, None)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--optimizer_type", "sgd"], "give --lr"),
        (["--max_forgetting", "3"], "--retention"),
        (["--log_dir", "a_file/logs"], "a_file/logs: cannot be written"),
        (["--cache", "a_file"], "a_file: cannot be written"),
        (["--resume_training", "logs/<run>"], "those here are logs/b, logs/a"),
        (["--resume_training", "logs/2020"], "those here are logs/b, logs/a"),
        (["--resume_training", "logs"], "those here are logs/b, logs/a"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(monkeypatch, tmp_path, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    for time, name in enumerate(("a", "b")):
        weights = tmp_path / "logs" / name / "weights"
        weights.mkdir(parents=True)
        (weights / "best_epoch_weights.pth").touch()
        os.utime(weights.parent, (time, time))
    with pytest.raises(InputError) as error:
        check_arguments(settled(*arguments))
    assert named in str(error.value).replace(os.sep, "/") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--ema", "0.9999"], "about 10,000 steps, and this run has 80"),
        (["--ema", "0.98"], None),
        (["--grad_cache", "100"], "--grad_cache 100 has no effect: a process has 64 images a step"),
        (["--grad_cache", "63"], None),
        (["--lora", "8", "--lock_text", "2"], "--lora trains low-rank changes only"),
        (["--lora", "8", "--lock_text"], None),
    ],
)
def test_arguments_without_effect_are_told(arguments, named):
    lines = list(without_effect(settled(*arguments), steps=80))
    assert [named in line for line in lines] == [True] if named else not lines


@pytest.mark.parametrize(
    "arguments, lines",
    [
        ([], ["the run goes on with epoch 3 of 10, of which 4 steps are done"]),
        (["--num_workers", "2"], [..., "changed: --num_workers None -> 2"]),
        (["--weight_decay", "0.5", "--freq", "2"],
         [..., "changed: --weight_decay 0.1 -> 0.5; --freq 5 -> 2"]),
        (["--log_dir", "x"], [...]),  # a run goes on in its own folder
        (["--epochs", "2", "--warmup_epochs", "1"],
         ["changed: --epochs 10 -> 2; --warmup_epochs None -> 1.0"]),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_tells_what_is_not_as_it_was(arguments, lines):
    before = as_saved(settled(), None)
    resumed = {"rows": [{}, {}], "losses": [1.0] * 4, "arguments": before}
    found = list(how_it_goes_on(settled(*arguments), resumed))
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
    assert 1 / 3 <= default_rate(config, batch_size, None) / published <= 3


def test_the_rate_follows_width_and_batch_up_to_a_limit():
    assert default_rate(CONFIGS["ViT-B/32"], 64, None) == 1e-5
    assert default_rate(CONFIGS["ViT-B/32"], 256, None) == 2e-5
    assert default_rate(CONFIGS["ViT-L/14"], 64, None) == 7.5e-6
    assert default_rate(CONFIGS["RN50x4"], 64, None) == 3e-6  # 2,560 channels in the last stage
    assert default_rate(CONFIGS["ViT-demo"], 1024, None) == 5e-5


def test_changes_of_low_rank_have_a_rate_of_their_own():
    for model in ("ViT-B/32", "ViT-L/14"):
        assert default_rate(CONFIGS[model], 64, lora=8) == 2e-4
