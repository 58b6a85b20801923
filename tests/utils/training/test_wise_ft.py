"""Weight interpolation and what a fine-tuning run makes of it."""

import csv

import pytest
import torch
from definitions import equal_scores
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from script_runs import error_line, run_script
from tiny import NAMED, tiny_clip
from torch import nn

from flickr8k.render_demo import render_demo
from utils.training.wise_ft import Mixtures, best_row, mix_into

SCRATCH = ["--resume_training", "none", "--model", "ViT-demo", "--lr", "1e-3", "--batch_size", "16"]


def test_between_the_weights_everything_moves_in_proportion():
    model = nn.BatchNorm1d(2)
    tuned = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned["weight"] = torch.tensor([1.0, 0.0])
    start = tuned | {"weight": torch.tensor([0.0, 4.0]), "num_batches_tracked": torch.tensor(3)}
    mix_into(model, start, tuned, 0.25)
    assert model.weight.tolist() == [0.25, 3.0] and model.num_batches_tracked == 0
    for alpha, end in ((0, start), (1, tuned)):
        mix_into(model, start, tuned, alpha)
        assert torch.equal(model.weight, end["weight"])


def alpha_of(model, tuned):
    """How much the model has of these weights, where the start is zeros."""
    return (model.visual.proj / tuned["visual.proj"]).median().item()


def mixed(tmp_path, alphas, scores_at, max_forgetting=2.0):
    """(chosen file, rows, the tuned weights) of a path from zeros; `scores_at(alpha)` gives R@1 and
    the scores of --retention, where alpha is read off the model's weights."""
    model = tiny_clip(NAMED["ViT-tiny"])
    tuned = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    start = {key: torch.zeros_like(tensor) for key, tensor in tuned.items()}
    (tmp_path / "weights").mkdir()
    mixtures = Mixtures(model, start, tmp_path, max_forgetting)
    for _ in mixtures.each(3, tuned, alphas):
        recall, retention = scores_at(alpha_of(model, tuned))
        mixtures.add(equal_scores(recall), 0.0, retention)
    chosen = mixtures.choose()
    saved = torch.load(chosen, weights_only=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(saved[key].to(tensor.dtype), tensor), key
    return chosen, mixtures.rows, alpha_of(model, tuned)


def test_the_best_point_of_the_path_is_chosen(tmp_path):
    """With a score that is highest half way, the file and the model have the weights half way."""
    chosen, rows, alpha = mixed(
        tmp_path, [1.0, 0.5, 0.0], lambda alpha: (100 * (1 - abs(alpha - 0.5)), {})
    )
    assert chosen == tmp_path / "weights" / "wise_ft_weights.pth"
    assert [row["mean_recall"] for row in rows] == pytest.approx([50, 100, 50])
    assert alpha == pytest.approx(0.5, rel=2e-3)
    with (tmp_path / "wise_ft.csv").open(newline="") as file:
        assert [float(row["alpha"]) for row in csv.DictReader(file)] == [1, 0.5, 0]


def test_the_best_point_of_the_ways_to_two_epochs_is_chosen(tmp_path, capsys):
    """The weights of the last epoch are twice those of the best one, and the score is highest at
    0.8 of these: the point 0.4 on the way to the last. Both ways begin at one point."""
    model = tiny_clip(NAMED["ViT-tiny"])
    best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    last = {key: 2 * tensor for key, tensor in best.items()}
    start = {key: torch.zeros_like(tensor) for key, tensor in best.items()}
    (tmp_path / "weights").mkdir()
    mixtures = Mixtures(model, start, tmp_path, 2.0)
    for epoch, tuned in ((3, best), (7, last)):
        for _ in mixtures.each(epoch, tuned, (0.0, 0.4, 0.7, 1.0)):
            mixtures.add(equal_scores(100 - abs(alpha_of(model, best) - 0.8)), 0.0, {})
    points = [(row["epoch"], row["alpha"]) for row in mixtures.rows]
    assert points == [(3, 0), (3, 0.4), (3, 0.7), (3, 1), (7, 0.4), (7, 0.7), (7, 1)]
    mixtures.choose()
    assert alpha_of(model, best) == pytest.approx(0.8, rel=2e-3)
    assert "the best, epoch 7 at alpha 0.4: " in capsys.readouterr().out
    Image.open(tmp_path / "wise_ft.png").verify()


@pytest.mark.parametrize(
    "max_forgetting, expected, said",
    [
        (6, 0.5, "the best that loses at most 6 points (--max_forgetting)"),
        (2, 0.25, "none loses at most 2 points (--max_forgetting)"),
    ],
)
def test_the_best_of_the_mixtures_that_lose_little_is_chosen(
    tmp_path, capsys, max_forgetting, expected, said
):
    """Recall rises along the path, ten points of what the weights could do are lost."""

    def scores_at(alpha):
        return 50 + alpha, {"retention_猫$^": 90 - 10 * alpha, "points_lost": 10 * alpha}

    chosen, _, alpha = mixed(tmp_path, [1.0, 0.5, 0.25], scores_at, max_forgetting)
    assert alpha == pytest.approx(expected, rel=2e-3)
    printed = capsys.readouterr().out
    assert said in printed
    with (tmp_path / "wise_ft.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["alpha"], float(row["points_lost"]), row["chosen"] == "1")
                for row in csv.DictReader(file)]  # fmt: skip
    assert [alpha for alpha, _, is_chosen in rows if is_chosen] == [f"{expected}"]
    assert [lost for _, lost, _ in rows] == pytest.approx([10, 5, 2.5], rel=2e-3)
    assert f"epoch 3 at alpha {expected:g}: {chosen}" in printed
    Image.open(tmp_path / "wise_ft.png").verify()


few = st.integers(-3, 9).map(float)
table = st.lists(st.fixed_dictionaries({"mean_recall": few, "points_lost": few}), min_size=1)


@given(table, st.integers(0, 9))
def test_the_best_row_is_that_of_a_search_and_stays_when_others_follow(rows, most_lost):
    """The first row than which no other is better; and since the weights of a row are gone once the
    next is scored, a row is the best of all only if it was so when it came."""

    def is_better(row, other):
        fits, other_fits = row["points_lost"] <= most_lost, other["points_lost"] <= most_lost
        if fits != other_fits:
            return fits
        if fits:
            return row["mean_recall"] > other["mean_recall"]
        return row["points_lost"] < other["points_lost"]

    best = best_row(rows, most_lost)
    first = next(row for row in rows if not any(is_better(other, row) for other in rows))
    assert best is first
    until_then = rows[: next(i for i, row in enumerate(rows) if row is best) + 1]
    assert best_row(until_then, most_lost) is best
    for row in rows:
        del row["points_lost"]  # without --retention
    assert best_row(rows, most_lost)["mean_recall"] == max(row["mean_recall"] for row in rows)


@pytest.mark.slow
def test_fine_tuning_with_all_that_keeps_old_abilities(tmp_path):
    """Layer decay, locked blocks, an average of weights, patience, paths of weights: they end at
    the scores of the best and of the last epoch, and start at those before training."""
    data = render_demo(tmp_path / "data", n_train=48, n_val=16)
    run_script("train.py", *SCRATCH, "--dataset_path", data, "--epochs", 3, "--log_dir", "first",
               cwd=tmp_path)  # fmt: skip
    (weights,) = (tmp_path / "first").glob("*/weights/best_epoch_weights.pth")
    done = run_script(
        "train.py", "--resume_training", weights, "--dataset_path", data, "--epochs", 6,
        "--batch_size", 16, "--lr", 1e-6, "--layer_decay", 0.8, "--lock_text", 1, "--ema", 0.5,
        "--captions_per_image", 3, "--patience", 1, "--wise_ft", 0, 0.5, 1, "--log_dir", "tuned",
        cwd=tmp_path, draws=True,
    )  # fmt: skip
    (run,) = (tmp_path / "tuned").iterdir()
    start = torch.load(run / "weights" / "start_weights.pth", weights_only=True)
    tuned = torch.load(run / "weights" / "last_epoch_weights.pth", weights_only=True)
    assert torch.equal(start["token_embedding.weight"], tuned["token_embedding.weight"])
    assert not torch.equal(start["text_projection"], tuned["text_projection"])
    with (run / "wise_ft.csv").open(newline="") as file:
        curves = {
            (float(row["epoch"]), float(row["alpha"])): float(row["mean_recall"])
            for row in csv.DictReader(file)
        }
    with (run / "metrics.csv").open(newline="") as file:
        start, *epochs = (float(row["mean_recall"]) for row in csv.DictReader(file))
    # The rate is so low that recall hardly moves: the first epoch that is no better is the last.
    assert len(epochs) < 6 and "(--patience): training ends" in done.stdout
    assert epochs[-1] <= epochs[-2] and epochs[:-1] == sorted(set(epochs[:-1]))
    best, last = epochs.index(max(epochs)) + 1, len(epochs)
    assert list(curves) == [(best, 0), (best, 0.5), (best, 1), (last, 0.5), (last, 1)]
    assert curves[best, 0] == pytest.approx(start, abs=3)
    for epoch in (best, last):  # float16 weights can move a close call
        assert curves[epoch, 1] == pytest.approx(epochs[epoch - 1], abs=3)
    Image.open(run / "wise_ft.png").verify()
    assert "wise_ft_weights.pth" in done.stdout


def test_a_path_needs_weights_to_start_from(tmp_path):
    data = render_demo(tmp_path / "data", n_train=16, n_val=4)
    line = error_line("train.py", *SCRATCH, "--dataset_path", data, "--wise_ft", 0, 1, cwd=tmp_path)
    assert "--wise_ft" in line and "--resume_training" in line
