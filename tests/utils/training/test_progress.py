"""What is said during an epoch and after it."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.errors import InputError
from utils.machine.processes import ALONE
from utils.training.progress import EpochTable, Progress
from utils.training.state import State


def row_of(epoch, recall, **more):
    losses = {"train_loss": 1.0, "val_loss": 1.0} if epoch else {"val_loss": 1.0}
    return {"epoch": epoch, **losses, "mean_recall": recall, "i2t_R@1": 1, "t2i_R@1": 2, **more}


def after_epochs(*recalls):
    state = State(nn.Linear(1, 1), optimizer=None, precision=None)
    state.epochs = [row_of(number, recall) for number, recall in enumerate(recalls, 1)]
    return state


def test_a_run_that_goes_on_after_the_last_step_of_an_epoch_cannot_tell_the_time_left(capsys):
    state = after_epochs(20.0)
    state.losses = [torch.tensor(1.0)] * 4
    table = EpochTable(state, epochs=4, steps=4)
    state.epochs.append(row_of(2, 30.0))
    table.add_epoch()
    cells = capsys.readouterr().out.splitlines()[-1].split()
    assert cells == ["2/4", "1.0000", "1.0000", "30.00", "1.00", "2.00", "00:00", "*"]


def test_an_epoch_is_a_line_in_the_columns_of_the_header(capsys, monkeypatch):
    """A program that goes on in the middle of the second of four epochs, at 10 seconds an epoch."""
    seconds = iter([0.0, 5.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    state = after_epochs(20.0)
    state.losses = [torch.tensor(1.0)] * 2
    table = EpochTable(state, epochs=4, steps=4)
    for epoch, recall in ((2, 30.0), (3, 25.0)):
        state.epochs.append(row_of(epoch, recall, retention_a=10.0, retention_b=15.0))
        table.add_epoch()
    _, first, second, *lines = capsys.readouterr().out.splitlines()
    names = ["epoch", "loss", "val loss", "mean recall", "R@1 image to text", "R@1 text to image",
             "retention", "time", "left", "best"]  # fmt: skip
    ends, at = [], 0
    for name in names:
        words = name.removeprefix("mean ").removeprefix("R@1 image ").removeprefix("R@1 text ")
        at = second.index(words, at) + len(words)
        above = name.removesuffix(words).strip()
        assert first[:at].endswith(above) and second[:at].endswith(words)
        ends.append(at)
    for line, cells in zip(
        lines,
        [
            ["2/4", "1.0000", "1.0000", "30.00", "1.00", "2.00", "12.50", "00:05", "00:20", "*"],
            ["3/4", "1.0000", "1.0000", "25.00", "1.00", "2.00", "12.50", "00:10", "00:10", ""],
        ],
        strict=True,
    ):
        assert line.split() == [cell for cell in cells if cell]
        assert all(line[:end].endswith(cell) for end, cell in zip(ends, cells, strict=True))


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
