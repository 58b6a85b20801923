"""A run of train.py on the disk: its files' names, the weights that count, its data. No torch."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError
from models.files import read_bytes

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

ARGUMENTS_LENGTH = 2**20  # bytes of an arguments.json


class TrainedOn(NamedTuple):
    """The data that a run was trained on."""

    dataset_path: Path
    languages: list[str]


def run_weights(run: Path) -> Path | None:
    """The weights of a run that count: the mixture that --wise_ft chose or, before that, those of
    the best epoch. None for another folder."""
    return next((file for file in (run / MIXTURE, run / BEST) if file.is_file()), None)


def runs_in(folder: Path) -> list[str]:
    """The runs in a folder, the newest first."""
    runs = {weights.parent for weights in folder.glob("*/weights") if any(weights.glob("*.pth"))}
    return sorted(map(str, runs), key=os.path.getmtime, reverse=True)


def run_folder(weights: str | Path) -> Path | None:
    """The folder of the run of a weights file `RUN/weights/<file>`, or `weights` itself if that is
    the folder of a run; else None."""
    weights = Path(weights).expanduser().resolve()
    run = weights.parent.parent if weights.is_file() else weights
    return run if (run / ARGUMENTS).is_file() else None


def saved_arguments(run: Path) -> dict[str, object]:
    """The arguments of a run. Raises `InputError` if its file holds anything else."""
    file = run / ARGUMENTS
    try:
        arguments = json.loads(read_bytes(file, ARGUMENTS_LENGTH))
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InputError(f"{file}: should hold the arguments of its run; mend it or remove it")
    return arguments


def trained_on(weights: str | Path) -> TrainedOn | None:
    """The data and the languages that the run of `weights` was trained on; None for weights of no
    run. Raises `InputError` if the arguments of the run do not name them."""
    run = run_folder(weights)
    if run is None:
        return None
    try:
        arguments = saved_arguments(run)
        languages = arguments["language"]
        languages = [languages] if isinstance(languages, str) else [str(la) for la in languages]
        return TrainedOn(Path(arguments["dataset_path"]), languages)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f"{run / ARGUMENTS}: should hold the dataset_path and language of its run, but cannot "
            "be used; give both, or mend it"
        ) from None
