"""A run of train.py on the disk: its files' names, the weights that count, its data. No torch."""

import os
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError
from models.files import read_json

# In the folder of a run, LOG_DIR/<time>.
ARGUMENTS = "arguments.json"
METRICS = "metrics.csv"
MIXTURES = "wise_ft.csv"
TEST_METRICS = "test_metrics.json"
CHECKPOINT = "weights/checkpoint.pth"
START = "weights/start_weights.pth"
BEST = "weights/best_epoch_weights.pth"
LAST = "weights/last_epoch_weights.pth"
MIXTURE = "weights/wise_ft_weights.pth"


class TrainedOn(NamedTuple):
    dataset_path: Path
    languages: list[str]


def run_weights(run: Path) -> Path | None:
    """The weights of a run that count: --wise_ft's mixture, or else the best epoch's; or None."""
    return next((file for file in (run / MIXTURE, run / BEST) if file.is_file()), None)


def runs_in(folder: Path) -> list[str]:
    """The runs with weights in a folder, the newest first."""
    files = sorted(folder.glob(f"*/{BEST}"), key=os.path.getmtime, reverse=True)
    return [str(file.parents[1]) for file in files]


def run_folder(weights: str | Path) -> Path | None:
    """The run's folder of a file `RUN/weights/<file>`, or `weights` if that is one; else None."""
    weights = Path(weights).expanduser().resolve()
    run = weights.parent.parent if weights.is_file() else weights
    return run if (run / ARGUMENTS).is_file() else None


def trained_on(weights: str | Path) -> TrainedOn | None:
    """The data and the languages that the run of `weights` was trained on; None for weights of no
    run. Raises `InputError` if the arguments of the run do not name them."""
    run = run_folder(weights)
    if run is None:
        return None
    arguments = read_json(run / ARGUMENTS)
    try:
        languages = arguments["language"]
        languages = [languages] if isinstance(languages, str) else list(map(str, languages))
        return TrainedOn(Path(arguments["dataset_path"]), languages)
    except (LookupError, TypeError):
        raise InputError(
            f"{run / ARGUMENTS}: should hold dataset_path and language; mend it"
        ) from None
