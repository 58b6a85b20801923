"""What does fine-tuning gain on photographs? Recipes on the same pretrained model, over seeds.

    python tests/benchmarks/photographs.py --dataset_path flickr8k

In miniature, since it needs no published weights: five sixths of the training images pretrain
ViT-demo with `train.py`, once a seed; the others then fine-tune it, ten times each, by

ours        `train.py` with its defaults
alone       the same at the rate and layer decay that it had before `--distill`
followed    the recipe of the project that this one follows: images letterboxed on grey, divided by
            255 and not normalised; Adam at 2e-5, constant for half of the run, then along a cosine
            to 1% of it; batches of 8 images, each with one of its captions; best by validation loss
normalised  the same on images as the model was pretrained with, to tell the two causes apart

Where the data holds square images (Flickr8k stored at 224x224), letterboxing changes nothing.
Reported are the scores on Flickr8k's validation images, which choose nothing here: epochs are
chosen on some of the training images, which nobody trains on. Retention is the same score on some
of the images that the model was pretrained on. All runs are kept in `--output`; what is there is
not trained again.
"""

import copy
import math
import random
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from fine_tuning import ALONE
from measure import print_table
from PIL import Image, ImageOps
from runs import (
    RECALL_NAMES,
    Metrics,
    add_data,
    add_jobs,
    build_parser,
    jobs,
    mean_recall,
    once,
    over_seeds,
    recalls,
    score,
    train,
)
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import load, tokenize
from models.clip import CLIP
from models.errors import InputError
from models.host import run_script
from models.weights.registry import CONFIGS
from utils.data.annotations import annotations_json, read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.runs.checkpoint import write_json

PRETRAINING = [
    "--resume_training", "none", "--model", "ViT-demo",
    "--epochs", 30, "--batch_size", 128, "--lr", 5e-4, "--freq", 100,
]  # fmt: skip
SHARE = 6  # of so many training images, the last one is kept for fine-tuning
CHOOSING = 10  # of so many others, the first one is kept for choosing epochs
RETAINED = 5  # of so many pretraining images, the first one measures retention
EPOCHS = 10
FOLLOWED = {"batch_size": 8, "lr": 2e-5}
GREY = (128, 128, 128)
OURS = {"ours": f"--epochs {EPOCHS}", "alone": f"{ALONE} --lr 1e-4"}  # arguments of train.py
THEIRS = ("followed", "normalised")
Scores = dict[str, Metrics]  # by set


def main() -> None:
    parser = build_parser(__doc__, output="logs/photographs")
    add_data(parser)
    add_jobs(parser)
    args = parser.parse_args()

    make_splits(args.dataset_path, args.output)
    with jobs(args.jobs) as pool:
        list(pool.map(lambda seed: pretrain(args.output, seed), args.seeds))
        wanted = list(product(["before", "before, as followed", *OURS, *THEIRS], args.seeds))
        found = pool.map(lambda each: scores_of(args.output, *each), wanted)
        scores = dict(zip(wanted, found, strict=True))
    names = dict.fromkeys(name for name, _ in wanted)
    results = {name: [scores[name, seed] for seed in args.seeds] for name in names}
    write_json(args.output / "photographs.json", results)
    print_results(results)
    print(f"every seed: {args.output / 'photographs.json'}")


# Data


def split(entries: list) -> tuple[list, list]:
    """Entries to pretrain on and entries to fine-tune on: every sixth goes to the latter."""
    kept = entries[SHARE - 1 :: SHARE]
    return [entry for i, entry in enumerate(entries) if i % SHARE != SHARE - 1], kept


def make_splits(dataset_path: Path, output: Path) -> None:
    """Data sets `pretrain` and `finetune` in `output`, which share the images and the validation
    and test captions; what `retention` validates on is part of what `pretrain` trains on."""
    entries = read_annotations(dataset_path / "en_train.json")
    others, fine_tuning = split(entries)
    choosing = others[::CHOOSING]
    pretraining = [entry for i, entry in enumerate(others) if i % CHOOSING]
    if not fine_tuning:
        raise InputError(f"{dataset_path}: {len(entries)} training images are too few to split")
    sets = {
        "pretrain": (pretraining, choosing),
        "finetune": (fine_tuning, choosing),
        "retention": (fine_tuning, pretraining[::RETAINED]),
    }
    for name, (train_entries, val_entries) in sets.items():
        write_photographs(dataset_path, output / name, train_entries, val_entries)


def write_photographs(dataset_path: Path, folder: Path, training: list, validation: list) -> None:
    """A data set of these entries of Flickr8k, and of its validation images to test on."""
    folder.mkdir(parents=True, exist_ok=True)
    share_images(dataset_path / "images", folder / "images")
    (folder / "en_train.json").write_bytes(annotations_json(training))
    (folder / "en_val.json").write_bytes(annotations_json(validation))
    shutil.copyfile(dataset_path / "en_val.json", folder / "en_test.json")


def share_images(source: Path, target: Path) -> None:
    """A link to the folder, or a copy where the system gives no links (Windows, to most users)."""
    if target.exists():
        return
    try:
        target.symlink_to(source.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


def letterboxed(side: int) -> Callable[[Image.Image], Tensor]:
    """The image shrunk to fit into a grey square of this side, `[3, side, side]`, from 0 to 1."""

    def transform(image: Image.Image) -> Tensor:
        square = ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color=GREY)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255

    return transform


# Runs


def pretrain(output: Path, seed: int) -> Path:
    arguments = ["--dataset_path", output / "pretrain", "--cache", output / "cache"]
    run = train(output / "pretrained" / str(seed), *PRETRAINING, "--seed", seed, *arguments)
    return run / "weights" / "last_epoch_weights.pth"


def scores_of(output: Path, name: str, seed: int) -> Scores:
    """Scores of the weights that the recipe `name` chooses, or of those before fine-tuning."""
    pretrained = pretrain(output, seed)

    def compute() -> Scores:
        if name in OURS:
            run = train(
                output / name / str(seed),
                *("--resume_training", pretrained, "--dataset_path", output / "finetune"),
                *("--cache", output / "cache", "--device", "cpu", "--seed", seed),
                *OURS[name].split(),
            )
            model, _ = load(run, "cpu")
        else:
            model, _ = load(pretrained, "cpu")
        transform = letterboxed(model.visual.input_resolution) if "followed" in name else None
        if name in THEIRS:
            fine_tune_followed(model, output, seed, transform)
        return {
            kind: score(model, data) for kind, data in evaluation_sets(output, transform).items()
        }

    return once(output / f"{name} {seed}.json", compute)


def fine_tune_followed(
    model: CLIP, output: Path, seed: int, transform: Callable[[Image.Image], Tensor] | None
) -> None:
    """Train by the recipe of the project that this one follows; `model` has the weights of the
    epoch with the lowest validation loss afterwards."""
    torch.manual_seed(seed)
    random.seed(seed)
    transform = transform or model.preprocess
    data = Flickr8kDataset(output / "finetune", model.visual.input_resolution, transform=transform)
    validation = evaluation_sets(output, transform)["validation"]
    optimizer = torch.optim.Adam(model.parameters(), lr=FOLLOWED["lr"], fused=True)
    lowest, best = math.inf, {}
    for epoch in tqdm(range(EPOCHS), desc=f"seed {seed}"):
        train_as_followed(model, data, optimizer, epoch)
        loss = validation_loss(model, validation)
        if loss < lowest:
            lowest, best = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)


def train_as_followed(
    model: CLIP, data: Flickr8kDataset, optimizer: torch.optim.Optimizer, epoch: int
) -> None:
    loader = batches(data, random.choice, shuffle=True)
    model.train()
    for step, (images, tokens) in enumerate(loader):
        share = followed_rate((epoch + step / len(loader)) / EPOCHS)
        for group in optimizer.param_groups:
            group["lr"] = FOLLOWED["lr"] * share
        loss = pair_loss(model, images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def followed_rate(progress: float) -> float:
    """The share of the peak learning rate after `progress` of the run, from 0 to 1: constant for
    half of it, then along half a cosine to 1%."""
    falling = max(0.0, 2 * progress - 1)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * falling)) / 2


@torch.inference_mode()
def validation_loss(model: CLIP, data: Flickr8kDataset) -> float:
    model.eval()
    loader = batches(data, lambda captions: captions[0], shuffle=False)
    return mean(pair_loss(model, images, tokens).item() for images, tokens in loader)


def batches(data: Flickr8kDataset, pick: Callable[[list[str]], str], shuffle: bool) -> DataLoader:
    """Whole batches of images and tokens of the caption that `pick` takes."""

    def collate(pairs: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, Tensor]:
        texts = [pick(captions) for _, captions in pairs]
        return torch.stack([image for image, _ in pairs]), tokenize(texts, truncate=True)

    return DataLoader(
        data, FOLLOWED["batch_size"], shuffle=shuffle, drop_last=True, collate_fn=collate
    )


def pair_loss(model: CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    logits_per_image, logits_per_text = model(images, tokens)
    pairs = torch.arange(len(images))
    return (F.cross_entropy(logits_per_image, pairs) + F.cross_entropy(logits_per_text, pairs)) / 2


# Scores


def evaluation_sets(output: Path, transform: Callable | None = None) -> dict[str, Flickr8kDataset]:
    """Validation and test images, and some of the pretraining; `transform` in place of CLIP's."""
    folders = {"validation": "finetune", "test": "finetune", "retention": "retention"}
    side = CONFIGS["ViT-demo"].image_resolution
    sets = {
        kind: Flickr8kDataset(
            output / folder, side, transform=transform, split="test" if kind == "test" else "val"
        )
        for kind, folder in folders.items()
    }
    if transform is None:
        for data in sets.values():
            data.cache(output / "cache")
    return sets


def print_results(results: dict[str, list[Scores]]) -> None:
    before = [mean_recall(scores["test"]) for scores in results["before"]]
    rows = []
    for name, seeds in results.items():
        columns = zip(*(recalls(scores["test"]) for scores in seeds), strict=True)
        means = [mean_recall(scores["test"]) for scores in seeds]
        gains = [mean - base for mean, base in zip(means, before, strict=True)]
        retained = [mean_recall(scores["retention"]) for scores in seeds]
        rows.append([name, *map(over_seeds, columns), over_seeds(gains), over_seeds(retained)])
    print(f"\ntest images, percent, mean ± standard deviation over {len(before)} seeds\n")
    print_table(["", *RECALL_NAMES, "gain", "retention"], rows)


if __name__ == "__main__":
    run_script(main)
