"""Which weights the scripts use, and what they say of them."""

import os
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest

import predict
import predict_zero_shot
from models.errors import InputError
from utils import classification, metric
from utils.runs.checkpoint import write_json
from utils.runs.default_weights import weights_to_use

BEST = "weights/best_epoch_weights.pth"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working folder, and that of the scripts; no runs in either."""
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("utils.runs.default_weights.SCRIPTS", beside)
    return here, beside


def make_run(run: Path, ended: datetime, **arguments: object) -> Path:
    best = run / BEST
    best.parent.mkdir(parents=True)
    best.touch()
    os.utime(best, (ended.timestamp(),) * 2)
    if arguments:
        write_json(run / "arguments.json", arguments)
    return best


def test_the_newest_run_is_looked_for_here_and_then_beside_the_scripts(folders):
    here, beside = folders
    assert weights_to_use(None) == "ViT-B/32"  # OpenAI's, where there is no run
    make_run(beside / "logs/a", datetime(2026, 1, 2))
    make_run(beside / "logs/b", datetime(2026, 1, 1))
    assert weights_to_use(None) == beside / "logs/a" / BEST
    make_run(here / "logs/c", datetime(2025, 1, 1))
    assert weights_to_use(None) == Path("logs/c") / BEST
    mixture = Path("logs/c/weights/wise_ft_weights.pth")
    mixture.touch()
    assert weights_to_use(None) == mixture
    with pytest.raises(InputError, match="did you mean ViT-B/32"):
        weights_to_use("ViT-B/33")


def test_the_line_tells_the_data_of_the_run(folders, capsys):
    best = make_run(folders[0] / "logs/a", datetime(2026, 3, 4, 5, 6), dataset_path="my\ndata",
                    language=["en", "cn"])  # fmt: skip
    for named, whose in ((None, "the newest run's"), (str(best), "a run's")):
        path = weights_to_use(named)
        told = f"weights: {path}, {whose}, trained on my data (en and cn)\n"
        assert capsys.readouterr().out == told


def test_a_broken_run_is_used_all_the_same(folders, capsys):
    best = make_run(folders[0] / "logs/a", datetime(2026, 3, 4), language="en")
    weights_to_use(str(best))
    assert capsys.readouterr().out == f"weights: {best}, a run's\n"


def test_names_are_of_no_run(folders, capsys):
    weights_to_use("ViT-B/16")
    weights_to_use(None)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "weights: ViT-B/16"
    assert second == "weights: ViT-B/32, published: no run in logs/ has weights yet"


@pytest.mark.parametrize("script", [predict, predict_zero_shot, metric, classification])
def test_no_weights_means_the_same_in_all_scripts(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"--weights NAME_OR_PATH model name, whose weights .* \(default: what the newest run in "
        r"logs/ chose, here or else beside the scripts; ViT-B/32 where there is no run\)",
        printed,
    )
