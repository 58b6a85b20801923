"""Training runs that a benchmark starts, and their scores: each is made once, and kept in a file.

Runs are processes of their own; one that was broken off goes on where it stopped. All scores are
those of `utils.metric`, over the same images and captions for everyone.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from measure import ROOT

from models.errors import InputError
from models.run_files import METRICS
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.encode import encode_images, encode_texts
from utils.retrieval.scores import TITLES, score_features
from utils.runs.arguments import integer, path
from utils.runs.checkpoint import write_json

EVALUATION_BATCH = 200
Metrics = dict[str, dict[str, float]]  # what `compute_metrics` returns


def build_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the arguments that these benchmarks share; `output` is the default folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--output", type=path, default=output,
        help="folder for runs and results (default: %(default)s)")
    add("--seeds", type=integer(0), nargs="+", default=[0, 1, 2, 3, 4],
        help="(default: 0 1 2 3 4)")
    # fmt: on
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_path", type=path, default="flickr8k",
                        help="Flickr8k as prepare.py makes it (default: %(default)s)")  # fmt: skip


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=integer(1), default=2,
                        help="runs at a time, each on one core (default: %(default)s)")  # fmt: skip


def jobs(number: int) -> ThreadPoolExecutor:
    """A pool for so many runs at the same time, each of which gets one core."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    return ThreadPoolExecutor(number)


def once(file: Path, compute: Callable[[], dict | list]) -> dict | list:
    """What `compute` returns, read from `file` if an earlier run wrote it there."""
    if not file.exists():
        write_json(file, compute())
    return json.loads(file.read_text(encoding="utf-8"))


def scored(folder: Path, compute: Callable[[], dict]) -> dict:
    """The scores of the runs in `folder`, computed once. Their weights are deleted then: those of
    a whole benchmark would fill a disk."""
    scores = once(folder / "scores.json", compute)
    for pattern in ("*.pth", "*.pt"):
        for weights in folder.rglob(pattern):
            weights.unlink()
    return scores


def train(log_dir: Path, *arguments: object) -> Path:
    """The folder in `log_dir` of a finished run of train.py with these arguments."""
    checkpoints = sorted(log_dir.glob("*/weights/checkpoint.pth"))
    if not any(log_dir.glob("*/R_mAP.png")):  # the last file that a run writes
        start = ["--resume_training", checkpoints[-1]] if checkpoints else arguments
        call(ROOT / "train.py", *start, "--log_dir", log_dir)
    return next(log_dir.glob("*/R_mAP.png")).parent


def validation_recalls(run: Path) -> list[float]:
    """Mean recall on the validation images at the start and after each epoch of a run."""
    with (run / METRICS).open(encoding="utf-8") as file:
        return [float(row["mean_recall"]) for row in csv.DictReader(file)]


def call(*command: object) -> None:
    """Run Python with these arguments; its output is seen as it comes."""
    command = [sys.executable, *map(str, command)]
    print(f"\n$ {' '.join(command)}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InputError(f"the command above ended with code {code}; what came before it is kept")


def score(model: torch.nn.Module, dataset: Flickr8kDataset) -> Metrics:
    """R@K, mAP@K and ranks in both directions over the whole set."""
    (metrics,) = score_in_parts(model, dataset, len(dataset))
    return metrics


def score_in_parts(
    model: torch.nn.Module, dataset: Flickr8kDataset, size: int
) -> Iterable[Metrics]:
    """The same over so many images at a time, and their captions."""
    tokens = dataset.tokens[:][:, : model.context_length]  # the models compared cut no caption
    images = encode_images(model, dataset, EVALUATION_BATCH, num_workers=0)
    texts = encode_texts(model, tokens)
    for rows in torch.arange(len(dataset)).split(size):
        rows = rows.tolist()
        captions = [caption for row in rows for caption in dataset.own_captions[row]]
        place = {caption: number for number, caption in enumerate(captions)}
        img_to_txt = {
            image: [place[caption] for caption in dataset.img_to_txt[row] if caption in place]
            for image, row in enumerate(rows)
        }
        txt_to_img: dict[int, list[int]] = {}
        for image, right in img_to_txt.items():
            for caption in right:
                txt_to_img.setdefault(caption, []).append(image)
        yield score_features(images[rows], texts[captions], img_to_txt, txt_to_img).as_dict()


def recalls(metrics: Metrics) -> list[float]:
    """R@1, 5, 10 image to text, the same text to image, and the mean of the six."""
    each = [metrics[way][f"R@{k}"] for way in TITLES for k in (1, 5, 10)]
    return [*each, mean(each)]


def mean_recall(metrics: Metrics) -> float:
    return recalls(metrics)[-1]


RECALL_NAMES = [f"{way} R@{k}" for way in TITLES for k in (1, 5, 10)] + ["mean recall"]


def over_seeds(values: Iterable[float]) -> str:
    """Mean and standard deviation (of a sample) as `4.31 ± 0.12`."""
    values = list(values)
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"
