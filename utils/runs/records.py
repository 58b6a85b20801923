"""Records of a run: the console's log; losses as text and plot, for TensorBoard and wandb."""

import io
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from utils.machine.pyzjr_parts import ConsoleLogger, LossHistory, show_config
from utils.runs.files import writing
from utils.runs.wandb_run import Wandb


class Log(ConsoleLogger):
    """Prints, and writes what is printed to a file as well, below a table of all arguments."""

    def __init__(self, file: Path, args: Namespace):
        super().__init__(file)
        with redirect_stdout(io.StringIO()) as table:
            show_config(args=args)
        with writing(file):
            file.write_text(self.remove_ansi_colors(table.getvalue()), "utf-8", "replace")

    def write(self, message: str) -> None:
        # File names can hold lone surrogates; the log cannot.
        with writing(self.log_file):
            super().write(message.encode(errors="replace").decode())


class Losses(LossHistory):
    """The losses and scores of each epoch in the folder of a run, of which `rows` are done. `draw`
    writes a plot of the losses of training and validation to a path."""

    def __init__(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        draw: Callable[[Sequence[float], Sequence[float], Path], None],
        wandb: Wandb | None = None,
    ):
        self.draw, self.wandb = draw, wandb
        with writing(folder):
            # Without a model pyzjr draws no graph: it can draw models of images alone.
            super().__init__(str(folder), model=None, input_shape=(1, 1))
        self.losses = [row["train_loss"] for row in rows]
        self.val_loss = [row["val_loss"] for row in rows]

    def append(self, row: Mapping[str, float]) -> None:
        """Add the row of an epoch; epoch 0 has the scores before training."""
        epoch, known = row["epoch"], {"epoch"}
        with writing(self.log_dir):
            if epoch:
                self.append_loss(epoch, row["train_loss"], row["val_loss"])
                known |= {"train_loss", "val_loss"}
            for name in row.keys() - known:
                self.writer.add_scalar(name, row[name], epoch)
        if self.wandb:
            self.wandb.log(row)

    def loss_plot(self) -> None:
        self.draw(self.losses, self.val_loss, Path(self.log_dir) / "epoch_loss.png")

    def close(self) -> None:
        with writing(self.log_dir):
            super().close()
        if self.wandb:
            self.wandb.finish()
