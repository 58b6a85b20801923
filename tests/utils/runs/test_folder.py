"""The best weights in the folder of a run, also where they are lost."""

import pytest
import torch
from tiny import tiny_clip

from models.run_files import BEST, CHECKPOINT
from utils.machine.processes import ALONE
from utils.runs.checkpoint import read_checkpoint
from utils.runs.folder import Run


class NoLosses:
    def append_loss(self, *_):
        pass


@pytest.fixture
def model():
    return tiny_clip()


def state(*recalls, losses=()):
    rows = [
        {"epoch": n, "train_loss": 1.0, "val_loss": 2.0, "mean_recall": recall}
        for n, recall in enumerate(recalls, 1)
    ]
    return {"start": None, "rows": rows, "losses": list(losses), "optimizer": {}}


def opened(folder):
    run = Run(ALONE, {}, "data")
    run.folder, run.loss_history = folder, NoLosses()
    (folder / "weights").mkdir(exist_ok=True)
    if checkpoint := read_checkpoint(folder / CHECKPOINT):
        run.best_since = checkpoint["best_since"]
    return run


def scale_of_best(run):
    return torch.load(run.folder / BEST, weights_only=True)["logit_scale"].item()


def end_epoch(run, model, *recalls):
    """End the epoch with the last of these recalls; its weights hold the number of epochs."""
    torch.nn.init.constant_(model.logit_scale, len(recalls))
    run.save_epoch(model, state(*recalls), keep_every=100)


def test_of_equal_epochs_the_first_is_the_best(tmp_path, model):
    """As in `State.epochs_since_best`."""
    run = opened(tmp_path)
    for recalls, best in (
        ([5.0], 1),
        ([5.0, 5.0], 1),
        ([5.0, 5.0, 6.0], 3),
        ([5.0, 5.0, 6.0, 6.0], 3),
    ):
        end_epoch(run, model, *recalls)
        assert scale_of_best(run) == best


def test_every_so_many_epochs_and_of_the_last_one_weights_stay(tmp_path, model):
    run = opened(tmp_path)
    for epochs in range(1, 6):
        torch.nn.init.constant_(model.logit_scale, epochs)
        run.save_epoch(model, state(*range(epochs)), keep_every=2)
    found = {
        file.name: torch.load(file, weights_only=True)["logit_scale"].item()
        for file in (run.folder / "weights").glob("*.pth")
        if file.name != "checkpoint.pth"
    }
    assert found == {
        "best_epoch_weights.pth": 5, "last_epoch_weights.pth": 5,
        "ep002_loss1.000_val_loss2.000.pth": 2, "ep004_loss1.000_val_loss2.000.pth": 4,
    }  # fmt: skip


def test_the_last_epoch_takes_the_place_of_lost_weights_and_better_ones_its(tmp_path, model):
    """Epoch 1 was the best and is lost: 2 is all there is, 3 is worse, 4 is better than 2."""
    torch.nn.init.constant_(model.logit_scale, 2)
    opened(tmp_path).replace_missing_best(model, state(9.0, 5.0))
    assert scale_of_best(opened(tmp_path)) == 2
    end_epoch(opened(tmp_path), model, 9.0, 5.0, 4.0)
    assert scale_of_best(opened(tmp_path)) == 2
    end_epoch(opened(tmp_path), model, 9.0, 5.0, 4.0, 6.0)
    assert scale_of_best(opened(tmp_path)) == 4


def test_in_the_middle_of_an_epoch_its_end_decides(tmp_path, model, capsys):
    """The weights of a step are no epoch's."""
    run = opened(tmp_path)
    run.replace_missing_best(model, state(9.0, losses=[1.0]))
    assert not (run.folder / BEST).exists() and len(capsys.readouterr().out.splitlines()) == 1
    end_epoch(run, model, 9.0, 1.0)
    assert scale_of_best(run) == 2


def test_weights_that_are_there_are_kept(tmp_path, model, capsys):
    run = opened(tmp_path)
    end_epoch(run, model, 9.0)
    end_epoch(run, model, 9.0, 5.0)
    run.replace_missing_best(model, state(9.0, 5.0))
    assert scale_of_best(run) == 1 and run.best_since == 0 and not capsys.readouterr().out
