"""Records of a run: the console's log, and losses as text, as a plot and for TensorBoard. They are
pyzjr's; errors of writing name the file."""

import threading
from pathlib import Path
from typing import Any

from models.errors import InputError
from utils.machine.pyzjr_parts import ConsoleLogger, LossHistory
from utils.runs.files import writing


class Log(ConsoleLogger):
    """Prints, and writes what is printed to a file as well."""

    def write(self, message: str) -> None:
        # File names can hold lone surrogates; the log cannot.
        message = message.encode(errors="replace").decode()
        if not self.terminal.isatty():
            message = self.remove_ansi_colors(message)
        try:
            with writing(self.log_file):
                super().write(message)
        except InputError as error:
            if isinstance(error.__cause__, BrokenPipeError):  # nobody reads the output any more
                raise error.__cause__ from None
            raise


class Losses(LossHistory):
    """The losses of each epoch in the folder of a run, of which `rows` are done."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        threading.excepthook = _leave_to_main_thread
        with writing(folder):
            # Without a model pyzjr draws no graph: it can draw models of images alone.
            super().__init__(str(folder), model=None, input_shape=(1, 1))
        self.losses = [row["train_loss"] for row in rows]
        self.val_loss = [row["val_loss"] for row in rows]

    def append_loss(self, epoch: int, loss: float, val_loss: float) -> None:
        with writing(self.log_dir):
            super().append_loss(epoch, loss, val_loss)

    def close(self) -> None:
        with writing(self.log_dir):
            super().close()


def _leave_to_main_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread; it raises the thread's error again at the next record."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)
