"""Which learning rate does fine-tuning want, and what does that depend on?

    python tests/benchmarks/learning_rate.py

Models of three widths (both towers' widths are in the proportion of ViT-demo's) learn world A of
`worlds.py` and are fine-tuned on B with rates a factor of two apart, which are told as rate times
width; the model of ViT-demo's width also with layer decay, in other batches, and on fewer images.
The score is the mean of what is gained on B and what is kept of A, on validation images, as it
serves to choose a default. All scores are kept in `--output`, and what is there is not computed
again.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from fine_tuning import RESEARCH, scores_of
from measure import print_table
from photographs import share_images
from runs import add_jobs, build_parser, jobs, over_seeds, scored, train
from worlds import render_world

from models import load
from models.clip import CLIP
from models.host import run_script
from models.weights.architecture import HEAD_WIDTH
from models.weights.registry import CONFIGS
from utils.data.annotations import annotations_json, read_annotations
from utils.runs.checkpoint import save_weights, write_json

PRODUCTS = (0.03, 0.06, 0.12, 0.24, 0.48)  # of rate and width
PRETRAINING = 0.096  # the same, that of `train.py --demo`
TUNING = ("--epochs", 10, "--distill", 6, "--wise_ft", 1, *RESEARCH)
FEW = 200  # images


class Variant(NamedTuple):
    """What differs from the defaults: the width of the image tower, and arguments of train.py."""

    width: int = CONFIGS["ViT-demo"].vision_width
    arguments: str = ""
    few: bool = False  # images


VARIANTS = {
    "width 128": Variant(128),
    "width 192": Variant(),
    "width 384": Variant(384),
    "layer decay 0.7": Variant(arguments="--layer_decay 0.7"),
    "batches of 32": Variant(arguments="--batch_size 32"),
    "batches of 128": Variant(arguments="--batch_size 128"),
    f"{FEW} images": Variant(few=True),
}


def main() -> None:
    parser = build_parser(__doc__, output="logs/learning_rate")
    add_jobs(parser)
    args = parser.parse_args()

    widths = sorted({variant.width for variant in VARIANTS.values()}, reverse=True)
    with jobs(args.jobs) as pool:
        list(pool.map(lambda each: pretrain(args.output, *each), product(widths, args.seeds)))
        wanted = list(product(VARIANTS, PRODUCTS, args.seeds))
        scores = dict(
            zip(wanted, pool.map(lambda each: tune(args.output, *each), wanted), strict=True)
        )
    results = {
        name: {str(rate): [scores[name, rate, seed] for seed in args.seeds] for rate in PRODUCTS}
        for name in VARIANTS
    }
    write_json(args.output / "learning_rate.json", results)
    print_results(results)
    print(f"every seed: {args.output / 'learning_rate.json'}")


def pretrain(output: Path, width: int, seed: int) -> Path:
    """The weights of a model of this width that has learned A."""
    data = render_world(output / str(seed) / "A", "A", seed)
    folder = output / str(seed) / f"width {width}"
    start = folder / "random.pth"
    if not start.exists():
        save_weights(random_model(width, seed), start)
    run = train(
        folder,
        *("--resume_training", start, "--dataset_path", data, "--seed", seed, "--device", "cpu"),
        *("--cache", "--lr", f"{PRETRAINING / width:.2e}", "--wise_ft", 1, *RESEARCH),
        *("--epochs", 28, "--batch_size", 50),
    )
    return run / "weights" / "last_epoch_weights.pth"


def random_model(width: int, seed: int) -> CLIP:
    """ViT-demo with an image tower of this width and a text tower of two thirds of it, in whole
    attention heads."""
    heads = round(width * 2 / 3 / HEAD_WIDTH)
    config = replace(
        CONFIGS["ViT-demo"],
        vision_width=width,
        vision_mlp_width=4 * width,
        transformer_width=heads * HEAD_WIDTH,
        transformer_mlp_width=4 * heads * HEAD_WIDTH,
        transformer_heads=heads,
    )
    torch.manual_seed(seed)
    return CLIP(config).initialize()


def tune(output: Path, name: str, rate: float, seed: int) -> dict[str, float]:
    """What is gained on B and kept of A on validation images, with `rate` times width."""
    variant, root = VARIANTS[name], output / str(seed)
    data = {world: render_world(root / world, world, seed) for world in ("A", "B")}
    train_on = few_images(data["B"], root / "B few") if variant.few else data["B"]
    folder = root / name / f"{rate:g}"

    def compute() -> dict[str, float]:
        run = train(
            folder,
            *("--resume_training", pretrain(output, variant.width, seed)),
            *("--dataset_path", train_on, "--seed", seed, "--device", "cpu", "--cache"),
            *("--lr", f"{rate / variant.width:.2e}", *TUNING, *variant.arguments.split()),
        )
        model, _ = load(run / "weights" / "last_epoch_weights.pth", "cpu")
        found = scores_of(model, data)
        return {"gained": found["B"]["val"], "kept": found["A"]["val"]}

    return scored(folder, compute)


def few_images(data: Path, folder: Path) -> Path:
    """The data set with its first training images alone."""
    folder.mkdir(exist_ok=True)
    share_images(data / "images", folder / "images")
    entries = read_annotations(data / "en_train.json")[:FEW]
    (folder / "en_train.json").write_bytes(annotations_json(entries))
    (folder / "en_val.json").write_bytes((data / "en_val.json").read_bytes())
    return folder


def print_results(results: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Each cell: the mean of gained and kept over the seeds with its deviation, then both."""
    rows = []
    for name, by_rate in results.items():
        cells = []
        for seeds in by_rate.values():
            both = over_seeds((seed["gained"] + seed["kept"]) / 2 for seed in seeds)
            gained, kept = (mean(seed[what] for seed in seeds) for what in ("gained", "kept"))
            cells.append(f"{both} ({gained:.0f}, {kept:.0f})")
        rows.append([name, *cells])
    print("\nrate times width: mean of gained and kept, percent ± standard deviation (both)\n")
    print_table(["", *(f"{rate:g}" for rate in PRODUCTS)], rows)


if __name__ == "__main__":
    run_script(main)
