"""From the prompt to a zero-shot answer: predict_zero_shot.py, the original CLIP, open_clip.

    python tests/benchmarks/cold_start.py --data flickr8k --clip_python CLIP_ENV/bin/python

Every run is a process of its own that loads the same archive (published format, float16, random
weights) on the CPU, prepares the first validation image, tokenises four labels, and prints their
probabilities, which are checked to be the same. Wall-clock time from start to exit and peak memory;
beside them, what importing torch and torchvision costs anyone, and `train.py --help`. The processes
take turns; the first round, which fills the disk cache, is not counted.

The original CLIP is `openai-clip` 1.0.1 on PyPI. It needs an environment with torch, torchvision
and setuptools below 70, named by --clip_python; without it, its row is left out. POSIX only.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from measure import ROOT, check, print_table
from tqdm import tqdm

from models.errors import InputError
from models.host import run_script
from utils.data.annotations import read_annotations

LABELS = ["a dog on grass", "two people in the snow", "a child in water", "a red car"]
TOLERANCE = 1e-3

ORIGINAL = """
import sys
import clip, torch
from PIL import Image
archive, image, *labels = sys.argv[1:]
model, preprocess = clip.load(archive, device="cpu")
with torch.no_grad():
    logits, _ = model(preprocess(Image.open(image))[None], clip.tokenize(labels))
print("Label probs:", logits.softmax(dim=-1).numpy())
"""
OPEN_CLIP = """
import sys
import open_clip, torch
from PIL import Image
archive, image, *labels = sys.argv[1:]
model = open_clip.load_openai_model(archive, device="cpu").eval()
visual = model.visual
preprocess = open_clip.image_transform(
    visual.image_size, is_train=False, mean=visual.image_mean, std=visual.image_std)
tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(labels)
with torch.no_grad():
    logits, _ = model.get_logits(preprocess(Image.open(image))[None], tokens)
print("Label probs:", logits.softmax(dim=-1).numpy())
"""


class Run(NamedTuple):
    """One process: what it printed, its seconds from start to exit, its peak memory in MB."""

    printed: str
    seconds: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", default="ViT-B/32", help="a ViT (default: %(default)s)")
    add("--layers", type=int, help="of both towers, for a quick check (default: the model's)")
    add("--rounds", type=int, default=5, help="runs of each that count (default: %(default)s)")
    add("--clip_python", metavar="PATH", help="interpreter that can import the original clip")
    args = parser.parse_args()

    file = Path(args.data) / "en_val.json"
    image = str(Path(args.data) / read_annotations(file)[0][0])
    with TemporaryDirectory() as folder:
        archive = str(Path(folder) / "archive.pt")
        # In another process: what a process has held at its peak counts for those that it starts.
        maker = get_context("spawn").Process(
            target=make_archive, args=(archive, args.model, args.layers)
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise InputError(f"no archive of {args.model} with {args.layers} layers can be made")
        runs = take_turns(commands(archive, image, args.clip_python), args.rounds)
    check_answers({name: taken[-1].printed for name, taken in runs.items()})
    seconds = print_results(args.model, runs)
    more = seconds["train.py --help"] - seconds["import torch"]
    print(f"train.py --help takes {more:+.2f} s beside import torch")


def make_archive(path: str, model: str, layers: int | None) -> None:
    import math

    from peers import open_clip_model
    from published import save_published

    weights = open_clip_model(model, layers, layers).state_dict()
    weights["logit_scale"].fill_(math.log(100))  # as in the published weights
    save_published(weights, Path(path))


def commands(archive: str, image: str, clip_python: str | None) -> dict[str, list[str]]:
    python = sys.executable
    zero_shot = [python, str(ROOT / "predict_zero_shot.py"), image, "--weights", archive]
    peers = {
        "open_clip": [python, "-c", OPEN_CLIP, archive, image, *LABELS],
        "import torch, torchvision": [python, "-c", "import torch, torchvision"],
        "import torch": [python, "-c", "import torch"],
        "train.py --help": [python, str(ROOT / "train.py"), "--help"],
    }
    if clip_python is None:
        print("the original CLIP is left out: no --clip_python was given")
    else:
        peers = {"original CLIP": [clip_python, "-c", ORIGINAL, archive, image, *LABELS]} | peers
    return {"ours": [*zero_shot, "--device", "cpu", "--labels", *LABELS]} | peers


def take_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[Run]]:
    """The runs that count of each command."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    names = list(commands)
    for _ in tqdm(range(rounds + 1), desc="rounds", leave=False):
        for name in names:
            runs[name].append(run(commands[name]))
        names.append(names.pop(0))
    return {name: taken[1:] for name, taken in runs.items()}


def run(command: list[str]) -> Run:
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise InputError(f"{command[0]} ended with {process.returncode}:\n{printed}")
    return Run(printed, seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def check_answers(printed: dict[str, str]) -> None:
    """Assert that all who predict answer as ours does."""
    answers = {name: probabilities(text) for name, text in printed.items()}
    ours = answers.pop("ours")
    print("ours answers", ours)
    for name, theirs in answers.items():
        if theirs:
            differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
            check(f"ours and {name}: probabilities", differences, TOLERANCE)


def probabilities(printed: str) -> list[float]:
    """The numbers after `Label probs:`; none where nothing was predicted."""
    found = re.search(r"Label probs: \[\[(.*?)\]\]", printed, re.DOTALL)
    return [float(number) for number in found[1].split()] if found else []


def print_results(model: str, runs: dict[str, list[Run]]) -> dict[str, float]:
    """A table of medians; the seconds are returned."""
    seconds = {name: median(run.seconds for run in taken) for name, taken in runs.items()}
    peaks = {name: median(run.peak_mb for run in taken) for name, taken in runs.items()}
    print()
    print_table(
        [f"zero-shot with {model}, cold", "s", "peak MB", "s, by ours", "peak, by ours"],
        (
            [
                name,
                f"{seconds[name]:.2f}",
                f"{peaks[name]:.0f}",
                f"{seconds[name] / seconds['ours']:.2f}",
                f"{peaks[name] / peaks['ours']:.2f}",
            ]
            for name in runs
        ),
    )
    return seconds


if __name__ == "__main__":
    run_script(main)
