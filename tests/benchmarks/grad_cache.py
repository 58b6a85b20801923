"""A large batch on a small card: gradient caching, its gradients, memory and time.

    python tests/benchmarks/grad_cache.py --batch_size 512 --chunk 32

A training step of the batch in chunks beside a step of a batch as small as a chunk: peak memory of
a process that does nothing else, weights and optimiser included, and images a second. Gradients in
chunks are checked against those of the same batch at once, with `--check` images. Memory is read
from /proc: Linux only. Weights and images are random, captions are as long as Flickr8k's.
"""

import argparse
from time import perf_counter

import torch
from measure import check, describe_cpu, extra_peak_megabytes, in_a_process, print_table

from models.clip_utils import create_model, tokenize
from models.host import run_script
from models.weights.registry import CONFIGS
from utils.flickr8k_dataloader import Batch
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.runs.arguments import integer
from utils.training.gradients import accumulate_gradients
from utils.training.optimizer import parameter_groups

CPU = torch.device("cpu")
WORDS = 11  # of a caption: 14 tokens with start and end, as Flickr8k's have on average


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=list(CONFIGS), default="ViT-B/32", help="default: %(default)s")
    add("--batch_size", type=integer(2), default=512, help="default: %(default)s")
    add("--chunk", type=integer(1), default=32, help="default: %(default)s")
    add("--check", type=integer(2), default=96, help="images to compare gradients on (default: 96)")
    args = parser.parse_args()

    print(describe_cpu())
    compare_gradients(args.model, args.check, args.chunk)
    print()
    rows = []
    for size, chunk in ((args.chunk, None), (args.batch_size, args.chunk)):
        megabytes, seconds = in_a_process(measure_steps, args.model, size, chunk)
        how = f"batch {size}" + (f" in chunks of {chunk}" if chunk else "")
        share = megabytes / rows[0][1] if rows else 1.0
        rows.append([how, round(megabytes), f"{share:.2f}", f"{size / seconds:.2f}"])
    print_table([args.model, "peak MB", "times the first", "images/s"], rows)


def random_batch(model_name: str, n: int) -> Batch:
    side = CONFIGS[model_name].image_resolution
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=random)
    captions = [" ".join(["dog", "red", "runs"][(i + j) % 3] for j in range(WORDS + i % 3))
                for i in range(n)]  # fmt: skip
    return Batch(images, torch.tensor([[0.97, 0.01, -0.02]]).repeat(n, 1), tokenize(captions))


def compare_gradients(model_name: str, n: int, chunk: int) -> None:
    torch.manual_seed(0)
    model, batch, precision = create_model(model_name), random_batch(model_name, n), float32()
    gradients = []
    for size in (None, chunk):
        accumulate_gradients(model, batch, precision, ALONE, size)
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    whole, chunked = (torch.cat([g.flatten() for g in one]) for one in gradients)
    difference = (whole - chunked).norm() / whole.norm()
    check(f"gradients of {n} images, by their norm,", [difference.item()], 1e-5)


def float32() -> Precision:
    return Precision(CPU, use_amp=False)


def measure_steps(model_name: str, n: int, chunk: int | None) -> tuple[float, float]:
    """Peak megabytes of two training steps, and the seconds that the second takes."""
    batch, precision = random_batch(model_name, n), float32()
    seconds = 0.0

    def train() -> None:
        nonlocal seconds
        torch.manual_seed(0)
        model = create_model(model_name)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.9, 0.1), lr=1e-5)
        for _ in range(2):  # the second has the optimiser's moments
            start = perf_counter()
            accumulate_gradients(model, batch, precision, ALONE, chunk)
            precision.update(model, optimizer, max_norm=1.0)
            seconds = perf_counter() - start

    return extra_peak_megabytes(train), seconds


if __name__ == "__main__":
    run_script(main)
