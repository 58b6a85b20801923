"""The weights in the folder of a run."""

import pytest
import torch
from tiny import tiny_clip

from models.run_files import BEST, MIXTURE, run_weights
from utils.machine.processes import ALONE
from utils.runs.folder import Run
from utils.training.state import State


class NoLosses:
    def append(self, row):
        pass


@pytest.fixture
def model():
    return tiny_clip()


class Saved(State):
    """A state with little to save."""

    def state_dict(self):
        return {"rows": self.epochs}


def state_of(model, *recalls):
    """As it is after epochs with these recalls."""
    state = Saved(model, optimizer=None, precision=None)
    state.epochs = [
        {"epoch": n, "train_loss": 1.0, "val_loss": 2.0, "mean_recall": recall}
        for n, recall in enumerate(recalls, 1)
    ]
    return state


@pytest.fixture
def run(tmp_path):
    run = Run(ALONE, {}, "data")
    run.folder, run.loss_history = tmp_path, NoLosses()
    (tmp_path / "weights").mkdir()
    return run


def scale_of_best(run):
    return torch.load(run.folder / BEST, weights_only=True)["logit_scale"].item()


def end_epoch(run, model, *recalls):
    """End the epoch with the last of these recalls; its weights hold the number of epochs."""
    torch.nn.init.constant_(model.logit_scale, len(recalls))
    run.save_epoch(state_of(model, *recalls), keep_every=100)


def test_of_equal_epochs_the_first_is_the_best(run, model):
    """As in `State.best_epoch`."""
    for recalls, best in (
        ([5.0], 1),
        ([5.0, 5.0], 1),
        ([5.0, 5.0, 6.0], 3),
        ([5.0, 5.0, 6.0, 6.0], 3),
    ):
        end_epoch(run, model, *recalls)
        assert scale_of_best(run) == best


def test_every_so_many_epochs_and_of_the_last_one_weights_stay(run, model):
    for epochs in range(1, 6):
        torch.nn.init.constant_(model.logit_scale, epochs)
        run.save_epoch(state_of(model, *range(epochs)), keep_every=2)
    found = {
        file.name: torch.load(file, weights_only=True)["logit_scale"].item()
        for file in (run.folder / "weights").glob("*.pth")
        if file.name != "checkpoint.pth"
    }
    assert found == {
        "best_epoch_weights.pth": 5, "last_epoch_weights.pth": 5,
        "ep002_loss1.000_val_loss2.000.pth": 2, "ep004_loss1.000_val_loss2.000.pth": 4,
    }  # fmt: skip


def test_a_mixture_of_earlier_epochs_does_not_count(run, model):
    """A finished run is continued: until it ends, its newest weights are those of an epoch."""
    end_epoch(run, model, 9.0)
    mixture = run.folder / MIXTURE
    mixture.touch()
    assert run_weights(run.folder) == mixture
    end_epoch(run, model, 9.0, 5.0)
    assert run_weights(run.folder) == run.folder / BEST


def test_other_ranks_write_nothing(run, model):
    run.processes = ALONE._replace(rank=1)
    end_epoch(run, model, 9.0)
    run.save_checkpoint(state_of(model))
    assert not [path for path in run.folder.rglob("*") if path.is_file()]
