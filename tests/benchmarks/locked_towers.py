"""Images a second of training with a locked tower, and with what it gives computed once.

    OMP_NUM_THREADS=1 python tests/benchmarks/locked_towers.py --data flickr8k

Steps as train.py takes them, from decoded images to the update, in turn on the same batches, of
whole images: of all weights, with one tower locked, and with that tower's features in the place of
its inputs (--cache_features). First the loss is checked to be the same for all. Random weights,
real images, and one caption of each.
"""

import argparse
from functools import partial
from itertools import islice
from statistics import median

import torch
import torch.nn.functional as F
from measure import alternate, check, describe_cpu, print_table, times_as_fast
from torch import Tensor
from training import STEP_TOLERANCE, VIT_MODELS, adamw, our_step

from models.clip_utils import create_model
from models.host import run_script
from utils import Flickr8kDataset
from utils.flickr8k_dataloader import Batch, TrainLoader
from utils.machine.precision import Precision
from utils.training.layer_groups import freeze

CPU = torch.device("cpu")
ALL = "nothing locked"


class Trainer:
    """Training with one tower locked, or none; `knows` the features of what is locked."""

    def __init__(self, model: str, tower: str | None, knows: bool, precision: Precision):
        torch.manual_seed(0)
        self.model = create_model(model)
        if tower:
            freeze(self.model, tower, unlocked=0)
        self.tower = tower if knows else None
        self.precision = precision
        self.optimizer = adamw(self.model.train())

    @torch.no_grad()
    def inputs(self, batch: Batch) -> Batch:
        """The batch as the steps take it."""
        with self.precision.autocast():
            if self.tower == "image":
                images = batch.augmented_images(self.model.preprocess)
                features = normalised(self.model.encode_image(images))
                return batch._replace(images=features, cached=frozenset(["image"]))
            if self.tower == "text":
                features = normalised(self.model.encode_text(batch.tokens))
                return batch._replace(tokens=features, cached=frozenset(["text"]))
        return batch

    def step(self, batch: Batch) -> float:
        """Take a step; return the loss before it."""
        return our_step(self.model, self.optimizer, batch, self.precision)


def normalised(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", choices=VIT_MODELS, default="ViT-B/32", help="default: %(default)s")
    add("--batch_size", type=int, default=32, help="default: %(default)s")
    add("--rounds", type=int, default=3, help="steps of each that count (default: %(default)s)")
    add("--use_amp", action="store_true", help="bfloat16 in the place of float32")
    args = parser.parse_args()

    print(describe_cpu())
    precision = Precision(CPU, args.use_amp)
    ways = {ALL: (None, False)}
    for tower in ("text", "image"):
        ways[f"--lock_{tower}"] = tower, False
        ways[f"--lock_{tower} --cache_features"] = tower, True
    trainers = {name: Trainer(args.model, *way, precision) for name, way in ways.items()}
    dataset = Flickr8kDataset(args.data, model=trainers[ALL].model)
    loader = TrainLoader(dataset, args.batch_size, CPU, augment=False)
    batches = list(islice(loader.epoch(1), args.rounds + 1))
    inputs = {name: list(map(t.inputs, batches)) for name, t in trainers.items()}
    losses = {name: t.step(inputs[name][0]) for name, t in trainers.items()}
    differences = [abs(loss / losses[ALL] - 1) for loss in losses.values()]
    check("losses of the first step", differences, STEP_TOLERANCE[args.use_amp])

    numbered = [{name: batches[i] for name, batches in inputs.items()} for i in range(len(batches))]
    steps = {name: partial(step_of, name, t) for name, t in trainers.items()}
    seconds = alternate(steps, numbered)
    print_table(
        [f"{args.model}, batch {args.batch_size}, {precision}", "images/s", "times as fast"],
        (
            [name, f"{args.batch_size / median(s):.2f}", times_as_fast(s, seconds[ALL])]
            for name, s in seconds.items()
        ),
    )


def step_of(name: str, trainer: Trainer, inputs: dict[str, Batch]) -> None:
    trainer.step(inputs[name])


if __name__ == "__main__":
    run_script(main)
