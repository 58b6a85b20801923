"""What is said after an epoch."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.retrieval.tables import TITLES
from utils.training.progress import compare_with_start, report_epoch

METRICS = {way: {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "mAP@1": 1.0, "mAP@5": 1.0, "mAP@10": 1.0,
                 "median_rank": 1.0, "mean_rank": 1.0} for way in TITLES}  # fmt: skip


def printed(capsys, before, after, images, epoch=1, rate=1e-4):
    row = {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0, "mean_recall": after}
    start = None if before is None else {"mean_recall": before}
    report_epoch(SimpleNamespace(start=start, epochs=[row]), 10, METRICS, images, rate)
    return capsys.readouterr().out


def test_a_clear_fall_in_the_first_epoch_is_told_with_a_rate_to_try(capsys):
    assert "--lr 3e-05" in printed(capsys, 80.0, 60.0, images=200)
    assert "--lr 1e-05" in printed(capsys, 80.0, 30.0, images=200)  # most of it is lost
    for before, after, epoch in ((60.0, 80.0, 1), (80.0, 60.0, 2), (None, 60.0, 1)):
        line = printed(capsys, before, after, images=200, epoch=epoch)
        assert f"epoch {epoch}/10" in line and "made it worse" not in line


def test_a_best_epoch_that_is_clearly_below_the_start_is_told(capsys):
    for best, is_told in ((60.0, True), (79.0, False), (85.0, False)):
        compare_with_start(SimpleNamespace(start={"mean_recall": 80.0}, best_recall=best), 200)
        assert ("training made it worse" in capsys.readouterr().out) == is_told
    compare_with_start(SimpleNamespace(start=None, best_recall=1.0), 200)  # from scratch
    assert not capsys.readouterr().out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_chance_alone_is_seldom_told(capsys, share):
    """Of two samples with the same share, the second is lower by two standard errors once in 44."""
    samples = np.random.default_rng(0).binomial(200, share, (400, 2)) / 2
    told = sum("made it worse" in printed(capsys, *pair, images=200) for pair in samples)
    assert told <= 400 * 0.045
