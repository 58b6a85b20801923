"""What is said during an epoch and after it."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from definitions import equal_scores

from flickr8k.render_demo import render_demo
from models.clip_utils import create_model
from models.errors import InputError
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.training.progress import Progress, announce, report_epoch

SCORES = equal_scores(1.0)


def test_points_that_are_gained_are_not_lost(capsys):
    for score, words in (
        (88.88, "points gained, on average: 11.11"),
        (66.66, "lost, on average: 11.11"),
    ):
        row = {"epoch": 2, "train_loss": 1.0, "val_loss": 1.0, "mean_recall": 1.0}
        start = {"mean_recall": 1.0, "retention_a": 77.77}
        state = SimpleNamespace(start=start, epochs=[row | {"retention_a": score}])
        report_epoch(state, 10, SCORES)
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    "has_products, use_amp, device, epochs, hints",
    [(True, False, "cpu", 0, 1), (False, False, "cpu", 0, 0), (True, True, "cpu", 0, 0),
     (True, False, "meta", 0, 0), (True, False, "cpu", 3, 0)],
)  # fmt: skip
def test_bfloat16_is_recommended_where_the_processor_has_it(
    tmp_path, capsys, monkeypatch, has_products, use_amp, device, epochs, hints
):
    """Once, without a number, and only if the run trains."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_products)
    model, cpu = create_model("ViT-demo"), torch.device("cpu")
    data = Flickr8kDataset(render_demo(tmp_path, n_train=4, n_val=2))
    data.prepare_for(model)
    precision = Precision(cpu, use_amp)
    precision.device = torch.device(device)
    state = SimpleNamespace(model=model, precision=precision, epochs=[{}] * epochs)
    announce(state, TrainLoader(data, 4, cpu), {"train": data, "val": data}, 3, tmp_path)
    assert capsys.readouterr().out.count("hint: ") == hints


class Loader(SimpleNamespace):
    device = torch.device("cpu")

    def __len__(self):
        return 5


def test_an_epochs_loss_is_that_of_all_its_steps_and_its_speed_that_of_the_steps_made_now(
    monkeypatch,
):
    """Of three steps, one was made before this program started; eight images each. The clock goes
    on by a second each time that it is asked."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    losses = [torch.tensor(loss) for loss in (1.0, 2.0, 6.0)]
    with Progress(Loader(batch_size=8, processes=ALONE), epoch=2, done=1) as progress:
        for step, _ in enumerate(progress.timed(["batch"] * 2), 1):
            progress.advance(losses[step], 1e-3, step)
        row = progress.summary(losses, 1e-3)
    seconds = 16 / row["images_per_second"]
    assert (row["train_loss"], row["lr"]) == (3, 1e-3)
    assert seconds == int(seconds) >= 3
    assert row["data_wait_percent"] == pytest.approx(100 * 2 / seconds)


def test_the_peak_memory_is_that_of_the_epochs_steps(monkeypatch):
    """Not of what came before, such as scoring."""
    peak = [9 * 2**20]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.append(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[-1])
    loader = Loader(batch_size=8, processes=ALONE)
    loader.device = torch.device("cuda", 0)
    with Progress(loader, epoch=1) as progress:
        peak[-1] = max(peak[-1], 5 * 2**20)
        assert progress.summary([torch.tensor(1.0)], 1e-3)["peak_memory_mb"] == 5


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_at_the_next_step(loss):
    with Progress(Loader(batch_size=8, processes=ALONE), epoch=1) as progress:
        progress.advance(torch.tensor(loss), 1e-3, 7)
        with pytest.raises(InputError, match=r"the loss is (nan|inf) at step 7, .*lower --lr"):
            progress.advance(torch.tensor(1.0), 1e-3, 8)
