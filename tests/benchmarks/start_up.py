"""From the start of train.py to its first training step, beside what nobody can do without.

    OMP_NUM_THREADS=1 python tests/benchmarks/start_up.py --data flickr8k

Random weights in a file, pixels in the cache, the CPU. CPU seconds of a process of its own: until
train.py takes its first step, without the scores before training; and of one that imports torch and
pyzjr, and loads the weights. The two take turns; the first round, which decodes the images and
fills the disk cache, is not counted.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from measure import ROOT, print_table

from models.errors import InputError
from models.host import run_script

LOADED = """
import sys, time
import torch, pyzjr
from models.clip_utils import load
load(sys.argv[1], "cpu")
print("CPU seconds:", time.process_time())
"""
FIRST_STEP = """
import os, runpy, sys, time
from utils.training import gradients
from utils.training.state import State

def first_step(*_, **options):
    print("\\nCPU seconds:", time.process_time(), flush=True)
    os._exit(0)

gradients.accumulate_gradients = first_step
State.is_at_start = False  # which would be scored first
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", default="ViT-B/32", help="default: %(default)s")
    add("--rounds", type=int, default=5, help="runs of each that count (default: %(default)s)")
    args = parser.parse_args()

    from models.clip_utils import create_model
    from utils.runs.checkpoint import save_weights

    with TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        save_weights(create_model(args.model), weights)
        training = ["--resume_training", weights, "--dataset_path", args.data.resolve(),
                    "--batch_size", 2, "--cache", Path(folder) / "pixels",
                    "--log_dir", Path(folder) / "logs", "--device", "cpu"]  # fmt: skip
        programs = {
            "train.py to its first step": (FIRST_STEP, *training),
            "import torch, pyzjr; load": (LOADED, weights),
        }
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(args.rounds + 1):
            for name, program in programs.items():
                seconds[name].append(cpu_seconds(*program))
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    *_, least = medians.values()
    print_table(
        [f"{args.model}, CPU", "CPU seconds", "by the last"],
        ([name, f"{value:.2f}", f"{value / least:.2f}"] for name, value in medians.items()),
    )


def cpu_seconds(program: str, *arguments: object) -> float:
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise InputError(f"train.py or load ended with {done.returncode}:\n{done.stderr}")
    return float(done.stdout.rpartition("CPU seconds:")[2])


if __name__ == "__main__":
    run_script(main)
