"""The contrastive loss of a large batch and its gradients: ours and open_clip's, time and memory.

    python tests/benchmarks/loss.py --batch_size 8192

Features are random. Value and gradients are checked to be the same; then the two take turns. Memory
is what a process of its own needs beyond its features. It is read from /proc: Linux only.
"""

import argparse
from statistics import median

import torch
import torch.nn.functional as F
from measure import (
    alternate,
    check,
    describe_cpu,
    extra_peak_megabytes,
    in_a_process,
    print_table,
    times_as_fast,
)
from open_clip.loss import ClipLoss
from torch import Tensor

from models.host import run_script
from utils import contrastive_loss
from utils.runs.arguments import integer

DIMENSIONS = 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch_size", type=integer(2), default=8192, help="default: %(default)s")
    add("--rounds", type=integer(1), default=5, help="runs of each that count (default: 5)")
    args = parser.parse_args()

    print(describe_cpu())
    features = random_features(args.batch_size)
    losses = {"ours": ours, "open_clip": open_clip}
    results = {name: with_gradients(loss, *features) for name, loss in losses.items()}
    errors = [
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(results["ours"], results["open_clip"], strict=True)
    ]
    check("loss and gradients, by their norm,", errors, 1e-4)
    print()

    contestants = {
        name: lambda _, loss=loss: with_gradients(loss, *features) for name, loss in losses.items()
    }
    seconds = alternate(contestants, range(args.rounds + 1))
    rows = []
    for name, values in seconds.items():
        megabytes = in_a_process(measure_memory, losses[name], args.batch_size)
        speed = times_as_fast(seconds["ours"], values)
        matrices = megabytes * 2**20 / (4 * args.batch_size**2)
        rows.append([name, f"{median(values):.3f}", speed, f"{megabytes:.0f}", f"{matrices:.2f}"])
    print_table(
        [
            f"batch {args.batch_size}",
            "s",
            "ours: times as fast",
            "extra peak MB",
            "float32 matrices",
        ],
        rows,
    )


def ours(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    return contrastive_loss(image_features, text_features, logit_scale)


def open_clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    image_features, text_features = (
        F.normalize(features, dim=-1) for features in (image_features, text_features)
    )
    return ClipLoss()(image_features, text_features, logit_scale.exp())


def random_features(n: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(n, DIMENSIONS, generator=random) for _ in range(2)]
    return *(x.requires_grad_() for x in features), torch.tensor(3.0, requires_grad=True)


def with_gradients(loss, *inputs: Tensor) -> list[Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def measure_memory(loss, n: int) -> float:
    features = random_features(n)
    with_gradients(loss, *random_features(8))  # loads what is loaded on first use
    return extra_peak_megabytes(lambda: with_gradients(loss, *features))


if __name__ == "__main__":
    run_script(main)
