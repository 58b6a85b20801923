"""The weights of a script: those of `--weights`, else the newest run's, else published ones."""

import argparse
import csv
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from models.errors import InputError, one_line
from models.run_files import BEST, METRICS, run_folder, run_weights, trained_on
from models.scripts import SCRIPTS
from utils.data.annotations import caption_file
from utils.runs.arguments import trained_weights

PUBLISHED = "ViT-B/32"
RUNS_SHOWN = 3


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add `--weights`, which means the same in all scripts."""
    parser.add_argument(
        "--weights",
        type=trained_weights,
        metavar="NAME_OR_PATH",
        help="model name, whose weights are downloaded if needed, weights file, or run's folder "
        "(default: what the newest run in logs/ chose, here or else beside the scripts; "
        f"{PUBLISHED} where there is no run)",
    )


def finished_runs() -> list[Path]:
    """The runs with weights, the newest first, of logs/ in the working folder, or else beside the
    scripts."""
    for logs in (Path("logs"), SCRIPTS / "logs"):
        if found := list(logs.glob(f"*/{BEST}")):
            found.sort(key=lambda file: file.stat().st_mtime, reverse=True)
            return [file.parents[1] for file in found]
    return []


def weights_to_use(named: str | None) -> str | Path:
    """The weights that `--weights` names, or the default; prints which. Raises `InputError` for
    what is neither a name nor a path."""
    from models.clip_utils import check_name

    if named:
        weights, whose = named, "a run's" if run_folder(named) else ""
    elif runs := finished_runs():
        weights, whose = run_weights(runs[0]), "the newest run's"
    else:
        weights, whose = PUBLISHED, "published: no run in logs/ has weights yet"
    check_name(weights)
    print("weights:", ", ".join(filter(None, [str(weights), whose, *_facts(weights)])))
    return weights


def _facts(weights: str | Path) -> list[str]:
    """Date, data and best score of the weights' run, as far as its files tell."""
    run = run_folder(weights)
    if run is None:
        return []
    ended = datetime.fromtimestamp(Path(weights).expanduser().stat().st_mtime)
    facts = [f"of {ended:%Y-%m-%d %H:%M}"]
    with suppress(InputError):
        data = trained_on(weights)
        languages = " and ".join(data.languages)
        facts.append(one_line(f"trained on {data.dataset_path} ({languages})"))
    with (
        suppress(OSError, ValueError, LookupError, TypeError, csv.Error),
        (run / METRICS).open(encoding="utf-8", newline="") as file,
    ):
        epochs = [row for row in csv.DictReader(file) if float(row["epoch"]) > 0]
        recall = max(float(row["mean_recall"]) for row in epochs)
        facts.append(f"mean recall of its best epoch {recall:.2f}")
    return facts


def runs_having(split: str) -> str:
    """The end of a message on missing captions: the newest runs whose data has this split."""
    having = []
    for run in finished_runs():
        with suppress(InputError):
            root, languages = trained_on(run) or (Path(), [])
            files = [caption_file(root, language, split) for language in languages]
            having += [str(run)] if files and all(map(Path.exists, files)) else []
    shown = " or ".join(having[:RUNS_SHOWN])
    return f"; with {split} captions: --weights {shown}" if having else ""
