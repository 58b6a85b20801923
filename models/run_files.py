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
    """The weights of a run that count: the mixture that --wise_ft chose or, before that, those of
    the best epoch. None for another folder."""
    return next((file for file in (run / MIXTURE, run / BEST) if file.is_file()), None)


def runs_in(folder: Path) -> list[str]:
    """The runs with weights in a folder, the newest first."""
    runs = {weights.parents[1] for weights in folder.glob("*/weights/*.pth")}
    return sorted(map(str, runs), key=os.path.getmtime, reverse=True)


def run_folder(weights: str | Path) -> Path | None:
    """The folder of the run of a weights file `RUN/weights/<file>`, or `weights` itself if that is
    the folder of a run; else None."""
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
        raise InputError(f"{run / ARGUMENTS}: should hold dataset_path and language") from None
