"""Scripts whose workers are no forks, as on Windows and macOS, and on Linux from Python 3.14."""

import csv
import json
import multiprocessing
import sys

import pytest
import torch
from script_runs import run_script

from flickr8k.render_demo import render_demo

MODELS = {"en": "ViT-tiny", "cn": "cn-tiny"}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="other tests show it, there is no fork"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captioned images, and class folders of the same in `classes`."""
    root = render_demo(tmp_path_factory.mktemp("data"), n_train=16, n_val=4)
    for split in ("train", "val"):
        for number, image in enumerate(sorted((root / "images").glob(f"{split}*"))):
            folder = root / "classes" / split / ("odd", "even")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / image.name).write_bytes(image.read_bytes())
    return root


def import_torch_once():
    """In the server of which workers are forks, not in each of them."""
    multiprocessing.set_forkserver_preload(["torch"])


def train(data, cwd, language, *arguments, **how):
    """The weights, losses and scores after an epoch."""
    run_script("train.py", "--dataset_path", data, "--resume_training", "none", "--model",
               MODELS[language], "--language", language, "--batch_size", 8, "--epochs", 1,
               "--device", "cpu", *arguments, cwd=cwd, **how)  # fmt: skip
    (table,) = cwd.glob("logs/*/metrics.csv")
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    weights = torch.load(table.parent / "weights" / "best_epoch_weights.pth")
    return weights, [(row["train_loss"], row["val_loss"], row["mean_recall"]) for row in rows]


@pytest.mark.parametrize(
    "start_method, language, script, arguments",
    [
        ("spawn", "cn", "utils/classification.py", ["--data", "{}/classes", "--linear_probe"]),
        ("forkserver", "en", "utils/metric.py", ["--dataset_path", "{}"]),
    ],
)
def test_workers_that_are_no_forks_change_no_result(
    data, tmp_path, start_method, language, script, arguments
):
    """The reference is the same script without workers. Each language is once cached."""
    caches = [["--cache", tmp_path / "cache"], []]
    if language == "en":
        caches.reverse()
    alone, others = tmp_path / "alone", tmp_path / "others"
    for folder in (alone, others):
        folder.mkdir()
    workers = ["--num_workers", 1]
    how = {"start_method": start_method, "prepare": import_torch_once}
    expected, expected_rows = train(data, alone, language, *caches[0])
    found, rows = train(data, others, language, *workers, *caches[1], **how)
    assert rows == expected_rows
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    arguments = [argument.format(data) for argument in arguments]
    run_script(script, *arguments, "--json", "scores.json", cwd=alone)
    run_script(script, *arguments, "--json", "scores.json", *workers, cwd=others, **how)
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (alone, others)]
    assert scores[0] == scores[1]
