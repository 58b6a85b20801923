"""Training at the largest batch that fits a GPU: ours and open_clip, bfloat16, compiled and not.

    python tests/benchmarks/gpu.py --data flickr8k

For each model and contender: the largest power of two that fits as batch, images/s and peak memory
there, and the share of the card's bfloat16 matrix rate, which is measured in the same run. Everyone
gets float32 weights under bfloat16 autocast, the same fused AdamW, random images that lie on the
GPU, and real captions; a step transfers its tokens. "Compiled" is torch.compile as each project
uses it. Contenders run in processes of their own, in turn, --repeats times. In float32 loss and
gradients are checked to be the same, in bfloat16 the loss. TFLOP are those that the result cannot
do without (see `training.step_flops`).

Without a GPU: `--device cpu --tiny` goes through all of it with one layer and a batch of 4 at most.
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from measure import alternate, check, in_a_process, matmul, print_table
from peers import open_clip_model
from torch import Tensor
from tqdm import tqdm
from training import (
    VIT_MODELS,
    adamw,
    check_agreement,
    open_clip_loss,
    our_loss,
    step_flops,
    train,
)

from models import build_model
from models.errors import InputError
from models.host import run_script
from models.weights.architecture import infer_config
from utils import Flickr8kDataset
from utils.machine.memory import peak_memory_mb

LOSS_TOLERANCE = 0.02  # of bfloat16 losses, relative: its numbers have 8 bits
CHECKED = 8  # pairs whose losses and gradients are compared
WARMUP = 3  # steps


@dataclass(frozen=True)
class Contender:
    """Ours or open_clip, as it is or compiled, on one model."""

    model: str
    layers: int | None  # of both towers; None: the model's
    ours: bool
    compiled: bool

    def __str__(self) -> str:
        return ("ours" if self.ours else "open_clip") + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Result:
    """What one process measured."""

    batch: int
    seconds: list[float]  # of each step
    flops: list[float]  # of each step
    peak_mb: float
    checked_loss: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add(
        "--models",
        nargs="+",
        choices=VIT_MODELS,
        default=["ViT-B/32", "ViT-B/16", "ViT-L/14"],
        help="default: ViT-B/32 ViT-B/16 ViT-L/14",
    )
    add("--steps", type=int, default=20, help="that count, in a process (default: %(default)s)")
    add("--repeats", type=int, default=2, help="processes of each (default: %(default)s)")
    add("--first_batch", type=int, default=64, help="doubled from here (default: %(default)s)")
    add("--last_batch", type=int, default=2**16, help="at most this (default: %(default)s)")
    add("--no_compile", action="store_true", help="leave torch.compile out")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    add("--tiny", action="store_true", help="one layer, batches of 2 and 4, 2 steps, small matrix")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU here; --device cpu --tiny runs without one")
    layers, side = None, 8192
    if args.tiny:
        layers, side = 1, 256
        args.first_batch, args.last_batch, args.steps = 2, 4, 2

    tokens = Flickr8kDataset(args.data).tokens
    rate = in_a_process(matrix_rate, side, args.device)
    card = "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"{card}, torch {torch.__version__}, a {side}-cube bfloat16 matrix product: "
          f"{rate / 1e12:.2f} TFLOP/s")  # fmt: skip
    for model in args.models:
        in_a_process(check_gradients, model, layers, args.device, tokens)
        contenders = [
            Contender(model, layers, ours, compiled)
            for compiled in ([False] if args.no_compile else [False, True])
            for ours in (True, False)
        ]
        print_results(model, run_in_turn(contenders, tokens, args), rate)


def run_in_turn(
    contenders: list[Contender], tokens: Tensor, args: argparse.Namespace
) -> dict[Contender, list[Result]]:
    """The largest batch is searched for in the first turn and kept in the others; for a compiled
    model the search starts where it ended for the same model as it is."""
    results: dict[Contender, list[Result]] = {contender: [] for contender in contenders}
    first = dict.fromkeys((True, False), args.first_batch)
    for turn in range(args.repeats):
        for contender, taken in tqdm(results.items(), desc=contenders[0].model, leave=False):
            search = (first[contender.ours], args.last_batch)
            if turn:
                search = (taken[0].batch, taken[0].batch)
            taken.append(in_a_process(measure, contender, tokens, *search, args.steps, args.device))
            first[contender.ours] = taken[0].batch
    return results


def print_results(model: str, results: dict[Contender, list[Result]], rate: float) -> None:
    losses = [result.checked_loss for taken in results.values() for result in taken]
    differences = [abs(loss / losses[0] - 1) for loss in losses]
    check(f"the bfloat16 losses of {CHECKED} pairs", differences, LOSS_TOLERANCE)
    print()
    images_per_second = {
        contender: taken[0].batch / median(s for result in taken for s in result.seconds)
        for contender, taken in results.items()
    }
    rows = []
    for contender, taken in results.items():
        speed = images_per_second[contender]
        flops = median(f for result in taken for f in result.flops) / taken[0].batch * speed
        rows.append(
            [
                str(contender),
                taken[0].batch,
                f"{speed:.0f}",
                f"{max(result.peak_mb for result in taken) / 2**10:.1f}",
                f"{flops / 1e12:.2f}",
                f"{flops / rate:.0%}",
                f"{images_per_second[replace(contender, ours=True)] / speed:.2f}",
            ]
        )
    measures = ["images/s", "peak GiB", "TFLOP/s", "of matrix product", "ours: times as fast"]
    print_table([f"{model}, bfloat16", "batch", *measures], rows)


def matrix_rate(side: int, device: str) -> float:
    """FLOP/s of a bfloat16 matrix product."""
    seconds = alternate(
        {"product": matmul(side, torch.bfloat16, device)}, range(31), waiting_for(device)
    )
    return 2 * side**3 / median(seconds["product"])


def check_gradients(name: str, layers: int | None, device: str, tokens: Tensor) -> None:
    theirs = open_clip_model(name, layers, layers)
    ours = build_model({key: tensor.clone() for key, tensor in theirs.state_dict().items()})
    images = random_images(CHECKED, ours.visual.input_resolution, device)
    peers = {f"open_clip, {name}, float32": (theirs.to(device), open_clip_loss)}
    check_agreement(ours.to(device), peers, images, tokens[:CHECKED])


def measure(
    contender: Contender, tokens: Tensor, first: int, last: int, steps: int, device: str
) -> Result:
    """Find the largest batch from `first` to `last`, and time `steps` there."""
    model = open_clip_model(contender.model, contender.layers, contender.layers)
    loss = open_clip_loss
    config = infer_config(model.state_dict())
    if contender.ours:
        model, loss = build_model(model.state_dict()), our_loss
    model.to(device).train()
    if contender.compiled:
        model.compile_towers() if contender.ours else model.compile()
    optimizer = adamw(model)
    side = config.image_resolution
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)

    with autocast:
        images = random_images(CHECKED, side, device)
        checked_loss = loss(model, images, tokens[:CHECKED]).item()

    def time_steps(batch: int, count: int) -> tuple[list[float], list[float]]:
        """Seconds and operations of all steps but the first; each draws its captions anew."""
        images = random_images(batch, side, device)
        random = torch.Generator().manual_seed(0)
        texts = [tokens[torch.randint(len(tokens), (batch,), generator=random)]
                 for _ in range(count)]  # fmt: skip
        torch.compiler.reset()  # or a second size would be compiled for all sizes, and slower
        seconds = alternate(
            {"step": lambda texts: train(model, loss, optimizer, images, texts, autocast)},
            texts,
            waiting_for(device),
        )
        return seconds["step"], [step_flops(config, chosen) for chosen in texts[1:]]

    def fits(batch: int) -> bool:
        try:
            time_steps(batch, 2)  # the optimizer's state is there from the second on
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad()
            free_memory()

    batch = largest_batch(fits, first, last)
    free_memory()
    seconds, flops = time_steps(batch, WARMUP + steps)
    peak_mb = peak_memory_mb(torch.device(device))
    return Result(batch, seconds[WARMUP - 1 :], flops[WARMUP - 1 :], peak_mb, checked_loss)


def largest_batch(fits: Callable[[int], bool], first: int, last: int) -> int:
    """The largest batch that fits, `first` halved or doubled so often, and no more than `last`."""
    batch = first
    while batch > 1 and not fits(batch):
        batch //= 2
    while batch < last and fits(2 * batch):
        batch *= 2
    return batch


def free_memory() -> None:
    """Give back what a step that did not fit has left, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def random_images(n: int, side: int, device: str) -> Tensor:
    return torch.randn(n, 3, side, side, device=device)


def waiting_for(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


if __name__ == "__main__":
    run_script(main)
