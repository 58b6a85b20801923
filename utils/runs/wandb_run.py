"""A run on wandb (Weights & Biases), where that is installed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.errors import one_line


class Wandb:
    """The run in `folder` as one of wandb's, in the project named after the folder of the runs.
    Whatever fails there is told on a line, and the run goes on without it."""

    def __init__(self, folder: Path, arguments: Mapping[str, Any]):
        self.run: Any = None
        self._try(lambda: self._start(folder.resolve(), arguments))

    def log(self, row: Mapping[str, float]) -> None:
        self._try(lambda: self.run and self.run.log(dict(row), step=row["epoch"]))

    def finish(self) -> None:
        self._try(lambda: self.run and self.run.finish())
        self.run = None

    def _start(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=folder.parent.name, id=folder.name, dir=folder, config=dict(arguments),
            resume="allow", settings=wandb.Settings(console="off"),
        )  # fmt: skip

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ImportError:
            print("--wandb: the run goes on without it, since it is missing: pip install wandb")
        except Exception as error:  # of the network, of an account, of its version
            self.run = None
            print(f"--wandb: the run goes on without it ({one_line(error)})")
