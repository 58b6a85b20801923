"""Peak memory of a training step, ours and open_clip's.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py --data flickr8k

Each is measured in a process of its own: the memory at the peak of two steps, the second of which
has the optimizer's moments, beyond that of the process before it had a model. So weights, gradients
and moments are in it, which are the same for both. Ours steps as train.py does, from the bytes of
the images to the update; open_clip's texts are padded to 77 tokens, as it trains. The same weights,
images and captions; the losses of the first step are checked to be the same. Memory is read from
/proc: Linux only.
"""

import argparse

import torch
from measure import check, describe_cpu, extra_peak_megabytes, in_a_process, print_table
from peers import open_clip_model
from torch import nn
from training import STEP_TOLERANCE, VIT_MODELS, adamw, open_clip_loss, our_step

from models import build_model
from models.host import run_script
from models.preprocess import normalize
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset
from utils.flickr8k_dataloader import Batch, TrainLoader
from utils.machine.precision import Precision

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", choices=VIT_MODELS, default="ViT-B/32", help="default: %(default)s")
    add("--layers", type=int, help="of both towers, for a quick check (default: the model's)")
    add("--batch_size", type=int, nargs="+", default=[32, 128], help="default: 32 128")
    args = parser.parse_args()

    print(describe_cpu())
    for batch_size in args.batch_size:
        rows = []
        for use_amp in (False, True):
            measured = {}
            for who in ("open_clip", "ours"):
                measured[who] = in_a_process(measure, who, args, batch_size, use_amp)
            (theirs, their_loss), (ours, our_loss) = measured.values()
            dtype = "bfloat16" if use_amp else "float32"
            difference = abs(our_loss / their_loss - 1)
            check(f"{dtype}, batch {batch_size}: losses", [difference], STEP_TOLERANCE[use_amp])
            rows.append([dtype, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"])
        print()
        title = f"{args.model}, batch {batch_size}, peak MB"
        print_table([title, "ours", "open_clip", "ours, by open_clip's"], rows)


def measure(
    who: str, args: argparse.Namespace, batch_size: int, use_amp: bool
) -> tuple[float, float]:
    """Peak megabytes of two steps, and the loss of the first."""
    batch = first_batch(args.data, CONFIGS[args.model].image_resolution, batch_size)
    precision = Precision(CPU, use_amp)
    losses: list[float] = []

    def steps() -> None:
        model = open_clip_model(args.model, args.layers, args.layers)
        step = open_clip_step
        if who == "ours":
            model = build_model(model.state_dict())  # which takes the tensors as they are
            step = our_step
        optimizer = adamw(model.train())
        losses.extend(step(model, optimizer, batch, precision) for _ in range(2))

    return extra_peak_megabytes(steps), losses[0]


def first_batch(data: str, side: int, n: int) -> Batch:
    """n training images, each with one caption."""
    return next(TrainLoader(Flickr8kDataset(data, side), n, CPU, augment=False).epoch(1))


def open_clip_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, precision: Precision
) -> float:
    with precision.autocast():
        loss = open_clip_loss(model, normalize(batch.images), batch.tokens)
    loss.backward()
    precision.update(model, optimizer, max_norm=1.0)
    return loss.item()


if __name__ == "__main__":
    run_script(main)
