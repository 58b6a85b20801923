"""What only a GPU can tell, in ten parts of at most 150 seconds each.

    python tests/benchmarks/gpu.py --data DATA --out OUT
    python tests/benchmarks/gpu.py --parts vit_b vit_l --batch 128

versions     of the software; which attention kernel is chosen for five shapes
lengths      attention at nine lengths of texts, first and second call, with and without cuDNN's
correctness  loss and gradients of all number formats, towers and ways to save memory
waits        the training loop, where waiting for the GPU is an error
loop         its speed for ViT-B/32, with and without distillation, and a profile
vit_b        training steps of ViT-B/32: ours, open_clip, transformers, as they are and compiled
vit_l        the same of ViT-L/14
train        train.py, stopped and resumed, and metric.py on its weights
memory       a step that does not fit, and then one that does
nccl         a step by a group of processes, of which there is one

Every part runs in a process of its own. OUT/results.jsonl gets a line of JSON after each contender,
with an error if it failed, and OUT/<part>.err what the part has printed besides.

Without a GPU, `--device cpu --tiny` goes through all of it, but for compiling.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import torch
from gpu_settings import Settings, free_memory

from flickr8k.render_demo import render_demo
from models.errors import InputError
from models.host import run_script
from utils.runs.arguments import integer, path

LIMIT = 150  # seconds
PARTS = {
    "versions": "gpu_checks",
    "lengths": "gpu_checks",
    "correctness": "gpu_checks",
    "waits": "gpu_checks",
    "loop": "gpu_speed",
    "vit_b": "gpu_speed",
    "vit_l": "gpu_speed",
    "train": "gpu_checks",
    "memory": "gpu_checks",
    "nccl": "gpu_checks",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="default: all")
    add("--data", type=path, metavar="FOLDER",
        help="images and captions as for train.py (default: rendered, as for --demo)")  # fmt: skip
    add("--out", type=path, default="logs/gpu", metavar="FOLDER", help="default: %(default)s")
    add("--batch", type=integer(2), default=256,
        help="images in a step whose speed is measured (default: %(default)s)")  # fmt: skip
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    add("--tiny", action="store_true", help="small models, batches and matrices, few steps")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU here; --device cpu --tiny runs without one")
    out = Path(args.out).resolve()
    train, val = (24, 8) if args.tiny else (600, 100)
    data = args.data or render_demo(out / "demo", n_train=train, n_val=val)
    batch = 4 if args.tiny else args.batch
    settings = Settings(torch.device(args.device), Path(data).resolve(), out, batch, args.tiny)
    out.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        run_in_time(part, settings)


def run_in_time(part: str, settings: Settings) -> None:
    """`run_part` in a process of its own, which is ended after `LIMIT` seconds with all that it has
    started."""
    process = get_context("spawn").Process(target=_run_apart, args=(part, settings))
    process.start()
    try:
        process.join(LIMIT)
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if process.exitcode:
        how = f"more than {LIMIT} s" if process.exitcode < 0 else f"exit code {process.exitcode}"
        record(settings, part, "all others", {"error": how})


def run_part(part: str, settings: Settings) -> None:
    """Measure a part's contenders one after the other."""
    for name, measure in getattr(import_module(PARTS[part]), part)(settings):
        started = time.perf_counter()
        try:
            found = measure()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        record(settings, part, name, {**found, "s": time.perf_counter() - started})
        free_memory()


def record(settings: Settings, part: str, contender: str, found: dict[str, object]) -> None:
    """Add a line to the results."""
    found = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in found.items()}
    line = json.dumps({"part": part, "contender": contender, **found})
    print(line, flush=True)
    with (settings.out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _run_apart(part: str, settings: Settings) -> None:
    os.setpgid(0, 0)
    with (settings.out / f"{part}.err").open("w", encoding="utf-8") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    run_part(part, settings)


if __name__ == "__main__":
    run_script(main)
