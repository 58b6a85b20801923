"""What a run writes into its folder, `LOG_DIR/<time>/`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError
from models.run_files import BEST, CHECKPOINT, LAST, METRICS, MIXTURE, START
from utils.machine.interrupt import Interrupt
from utils.machine.processes import Processes
from utils.runs.checkpoint import save_checkpoint, save_weights, write_csv
from utils.runs.commands import command
from utils.runs.files import TEMPORARY, writing

if TYPE_CHECKING:
    from utils.training.state import State


class Run:
    """What a run writes: weights, checkpoint and tables. Only rank 0 writes."""

    def __init__(self, processes: Processes, arguments: dict[str, Any], data: str):
        self.processes = processes
        self.arguments = arguments  # as in arguments.json
        self.data = data  # fingerprint of the data set
        self.folder: Path | None = None  # None on other ranks
        self.loss_history: Any = None  # pyzjr's, on rank 0

    def start_weights(self) -> Path:
        """The file of the weights that the run starts from, in all processes."""
        return self.processes.broadcast(self.folder) / START

    def save_checkpoint(self, state: State) -> None:
        """Write everything needed to go on."""
        if self.processes.is_rank_0:
            of_run = {"arguments": self.arguments, "data": self.data}
            save_checkpoint(self.folder / CHECKPOINT, **of_run, **state.state_dict())

    def save_epoch(self, state: State, keep_every: int) -> None:
        """Write weights, checkpoint and tables. The weights of every `keep_every`-th epoch stay."""
        if not self.processes.is_rank_0:
            return
        row = state.epochs[-1]
        if state.best_epoch == row["epoch"]:
            save_weights(state.scored, self.folder / BEST)
        if row["epoch"] % keep_every == 0:
            losses = f"loss{row['train_loss']:.3f}_val_loss{row['val_loss']:.3f}"
            name = f"ep{row['epoch']:03}_{losses}.pth"
            save_weights(state.scored, self.folder / "weights" / name)
        save_weights(state.scored, self.folder / LAST)
        self.save_checkpoint(state)
        (self.folder / MIXTURE).unlink(missing_ok=True)  # of earlier epochs
        before = [state.start] if state.start else []  # the scores of the starting weights
        write_csv(self.folder / METRICS, before + state.epochs)
        for new in [*before, row] if row["epoch"] == 1 else [row]:
            self.loss_history.append(new)

    def stopped(self, interrupt: Interrupt) -> SystemExit:
        """Print how to go on after a signal; return what ends the program."""
        if self.processes.is_rank_0:
            self.loss_history.close()
            arguments = "--resume_training", self.folder
            line = command("train.py", *arguments, processes=self.processes.size)
            print(f"\nstopped by a signal; to go on:\n  {line}")
        return interrupt.exit()


def new_run_folder(log_dir: str | os.PathLike, name: str) -> Path:
    """Make `LOG_DIR/<name>/weights/` and return `LOG_DIR/<name>`, numbered if the name is taken."""
    number = 1
    while True:
        folder = Path(log_dir) / (name if number == 1 else f"{name}_{number}")
        try:
            (folder / "weights").mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"--log_dir {log_dir}: cannot be written ({error.strerror})") from None


def reopen_run_folder(checkpoint: str | os.PathLike, state: dict[str, Any]) -> Path:
    """The folder of the run of `RUN/weights/checkpoint.pth`. Unfinished files of a killed run are
    removed, and tables written anew from `state`, the checkpoint's content. Raises `InputError` for
    a checkpoint outside the folder of a run."""
    weights = Path(checkpoint).expanduser().resolve().parent
    if weights.name != "weights":
        raise InputError(f"{checkpoint}: a run goes on in its folder: put it back to "
                         f"RUN/{CHECKPOINT}")  # fmt: skip
    run = weights.parent
    rows = state["rows"]
    history = [f"Epoch {r['epoch']}: train: {r['train_loss']} val: {r['val_loss']}\n" for r in rows]
    with writing(run):
        for left in (*run.glob(f"{TEMPORARY}*"), *weights.glob(f"{TEMPORARY}*")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (run / "epoch_loss.txt").write_text("".join(history))
    if rows:
        write_csv(run / METRICS, ([state["start"]] if state["start"] else []) + rows)
    return run
