"""The best weights in the folder of a run, also where they are lost."""

import pytest
import torch
from tiny import tiny_clip

from models.run_files import BEST, CHECKPOINT, MIXTURE, run_weights
from utils.machine.processes import ALONE
from utils.runs.checkpoint import read_checkpoint
from utils.runs.folder import Run
from utils.training.state import State


class NoLosses:
    def append(self, row):
        pass


@pytest.fixture
def model():
    return tiny_clip()


class Saved(State):
    """A state with the fields of a checkpoint that the best weights depend on."""

    def state_dict(self):
        return {"rows": self.epochs, "best_since": self.best_since, "optimizer": {}}


def state_of(run, model, *recalls, losses=()):
    """As it is after epochs with these recalls, when the run goes on from its checkpoint."""
    state = Saved(model, optimizer=None, precision=None)
    state.epochs = [
        {"epoch": n, "train_loss": 1.0, "val_loss": 2.0, "mean_recall": recall}
        for n, recall in enumerate(recalls, 1)
    ]
    state.losses = list(losses)
    if checkpoint := read_checkpoint(run.folder / CHECKPOINT):
        state.best_since = checkpoint["best_since"]
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
    run.save_epoch(state_of(run, model, *recalls), keep_every=100)


def test_of_equal_epochs_the_first_is_the_best(run, model):
    """As in `State.epochs_since_best`."""
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
        run.save_epoch(state_of(run, model, *range(epochs)), keep_every=2)
    found = {
        file.name: torch.load(file, weights_only=True)["logit_scale"].item()
        for file in (run.folder / "weights").glob("*.pth")
        if file.name != "checkpoint.pth"
    }
    assert found == {
        "best_epoch_weights.pth": 5, "last_epoch_weights.pth": 5,
        "ep002_loss1.000_val_loss2.000.pth": 2, "ep004_loss1.000_val_loss2.000.pth": 4,
    }  # fmt: skip


def test_the_last_epoch_takes_the_place_of_lost_weights_and_better_ones_its(run, model):
    """Epoch 1 was the best and is lost: 2 is all there is, 3 is worse, 4 is better than 2."""
    torch.nn.init.constant_(model.logit_scale, 2)
    run.replace_missing_best(state_of(run, model, 9.0, 5.0))
    assert scale_of_best(run) == 2
    end_epoch(run, model, 9.0, 5.0, 4.0)
    assert scale_of_best(run) == 2
    end_epoch(run, model, 9.0, 5.0, 4.0, 6.0)
    assert scale_of_best(run) == 4


def test_in_the_middle_of_an_epoch_its_end_decides(run, model, capsys):
    """The weights of a step are no epoch's."""
    run.replace_missing_best(state_of(run, model, 9.0, losses=[1.0]))
    assert not (run.folder / BEST).exists() and len(capsys.readouterr().out.splitlines()) == 1
    end_epoch(run, model, 9.0, 1.0)
    assert scale_of_best(run) == 2


def test_weights_that_are_there_are_kept(run, model, capsys):
    end_epoch(run, model, 9.0)
    end_epoch(run, model, 9.0, 5.0)
    state = state_of(run, model, 9.0, 5.0)
    run.replace_missing_best(state)
    assert scale_of_best(run) == 1 and state.best_since == 0 and not capsys.readouterr().out


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
    run.save_checkpoint(state_of(run, model))
    run.replace_missing_best(state_of(run, model, 9.0))
    assert not [path for path in run.folder.rglob("*") if path.is_file()]
