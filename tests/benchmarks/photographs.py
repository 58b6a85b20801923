"""Does fine-tuning make it better? Two recipes on the same pretrained model, over several seeds.

    python tests/benchmarks/photographs.py --dataset_path flickr8k

In miniature, since it needs no published weights: five sixths of the training images pretrain
ViT-demo with `train.py`, once a seed; the others then fine-tune it, by

ours        `train.py` with its defaults (or with `--ours`)
followed    the recipe of the project that this one follows: images letterboxed on grey, divided by
            255 and not normalised; Adam at 2e-5, constant for half of the run, then along a cosine
            to 1% of it; batches of 8 images, each with one of its captions; best by validation loss
normalised  the same on images as the model was pretrained with, to tell the two causes apart

Where the data holds square images (Flickr8k stored at 224x224), letterboxing changes nothing.
Reported are the scores on the validation images, epoch by epoch, and retention: those on
1,000 of the images that the model was pretrained on. Epochs and settings are chosen on the
validation images. All runs are kept in `--output`; what is there is not trained again.
"""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from measure import print_table
from PIL import Image, ImageOps
from runs import RECALL_NAMES, add_data, build_parser, once, over_seeds, recalls, score, train
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from models import load, tokenize
from models.clip import CLIP
from models.errors import InputError, run_script
from models.weights.registry import CONFIGS
from utils.data.annotations import annotations_json, read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.metric import mean_recall
from utils.runs.arguments import path
from utils.runs.checkpoint import write_json
from utils.runs.files import save_figure

PRETRAINING = [
    "--resume_training", "none", "--model", "ViT-demo",
    "--epochs", 30, "--batch_size", 128, "--lr", 5e-4, "--freq", 100,
]  # fmt: skip
SHARE = 6  # of so many training images, the last one is kept for fine-tuning
RETAINED = 5  # of so many pretraining images, the first one measures retention
EPOCHS = 10
FOLLOWED = {"batch_size": 8, "lr": 2e-5}
GREY = (128, 128, 128)
COLOURS = {"ours": "C0", "followed": "C3", "normalised": "C1"}
Epochs = list[dict]  # of a run: scores before training, then after each epoch


def main() -> None:
    parser = build_parser(__doc__, output="logs/photographs")
    add_data(parser)
    add = parser.add_argument
    # fmt: off
    add("--ours", default="", metavar="ARGUMENTS",
        help="of train.py in place of its defaults, in quotes: --ours='--lr 1e-4'")
    add("--plot", type=path, default=Path(__file__).with_suffix(".png"), metavar="FILE",
        help="(default: %(default)s)")
    # fmt: on
    args = parser.parse_args()

    make_splits(args.dataset_path, args.output)
    runs: dict[str, list[Epochs]] = {name: [] for name in COLOURS}
    for seed in args.seeds:
        pretrained = pretrain(args.output, seed)
        runs["ours"].append(fine_tune_ours(args.output, pretrained, seed, args.ours))
        for name in ("followed", "normalised"):
            runs[name].append(fine_tune_followed(args.output, pretrained, seed, name))
    write_json(args.output / "photographs.json", runs)
    print_results(runs)
    plot(runs, args.plot)
    print(f"epoch by epoch: {args.output / 'photographs.json'}, plot: {args.plot}")


# Data


def split(entries: list) -> tuple[list, list]:
    """Entries to pretrain on and entries to fine-tune on: every sixth goes to the latter."""
    kept = entries[SHARE - 1 :: SHARE]
    return [entry for i, entry in enumerate(entries) if i % SHARE != SHARE - 1], kept


def make_splits(dataset_path: Path, output: Path) -> None:
    """Data sets `pretrain` and `finetune` in `output`, which share the images and the validation
    captions; what `retention` validates on is part of what `pretrain` trains on."""
    entries = read_annotations(dataset_path / "en_train.json")
    validation = read_annotations(dataset_path / "en_val.json")
    pretraining, fine_tuning = split(entries)
    if not fine_tuning:
        raise InputError(f"{dataset_path}: {len(entries)} training images are too few to split")
    sets = {
        "pretrain": (pretraining, validation),
        "finetune": (fine_tuning, validation),
        "retention": (fine_tuning, pretraining[::RETAINED]),
    }
    for name, (train_entries, val_entries) in sets.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        share_images(dataset_path / "images", folder / "images")
        (folder / "en_train.json").write_bytes(annotations_json(train_entries))
        (folder / "en_val.json").write_bytes(annotations_json(val_entries))


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


def fine_tune_ours(output: Path, pretrained: Path, seed: int, extra: str) -> Epochs:
    """Fine-tune with train.py, keeping the weights of every epoch, and score each of them."""
    name = " ".join(["ours", *extra.split()])
    log_dir = output / name / str(seed)

    def epochs() -> Epochs:
        run = train(
            log_dir,
            *("--resume_training", pretrained, "--dataset_path", output / "finetune"),
            *("--cache", output / "cache", "--freq", 1, "--seed", seed, *extra.split()),
        )
        weights = [pretrained, *sorted((run / "weights").glob("ep*.pth"))]
        sets = evaluation_sets(output)
        scored = [
            score_on(sets, load(file, "cpu")[0]) for file in tqdm(weights, desc="scoring epochs")
        ]
        best = max(range(1, len(scored)), key=lambda i: mean_recall(scored[i]["validation"]))
        scored[best]["best"] = True
        return scored

    return once(log_dir / "epochs.json", epochs)


def fine_tune_followed(output: Path, pretrained: Path, seed: int, name: str) -> Epochs:
    """Fine-tune by the recipe of the project that this one follows, scored as it preprocesses; or
    by the same recipe on normalised images."""

    def epochs() -> Epochs:
        torch.manual_seed(seed)
        random.seed(seed)
        model, preprocess = load(pretrained, "cpu")
        side = model.visual.input_resolution
        transform = letterboxed(side) if name == "followed" else preprocess
        data = Flickr8kDataset(output / "finetune", side, transform=transform)
        sets = evaluation_sets(output, transform)
        scored = [score_on(sets, model)]
        optimizer = torch.optim.Adam(model.parameters(), lr=FOLLOWED["lr"], fused=True)
        for epoch in tqdm(range(EPOCHS), desc=f"{name}, seed {seed}"):
            train_as_followed(model, data, optimizer, epoch)
            loss = validation_loss(model, sets["validation"])
            scored.append(score_on(sets, model) | {"val_loss": loss})
        min(scored[1:], key=lambda epoch: epoch["val_loss"])["best"] = True
        return scored

    return once(output / name / f"{seed}.json", epochs)


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
    """Validation images, and images of the pretraining; `transform` in place of CLIP's own."""
    side = CONFIGS["ViT-demo"].image_resolution
    sets = {
        "validation": Flickr8kDataset(output / "finetune", side, "en", False, transform),
        "retention": Flickr8kDataset(output / "retention", side, "en", False, transform),
    }
    if transform is None:
        for data in sets.values():
            data.cache(output / "cache")
    return sets


def score_on(sets: dict[str, Flickr8kDataset], model: CLIP) -> dict:
    return {name: score(model, data) for name, data in sets.items()}


def print_results(runs: dict[str, list[Epochs]]) -> None:
    """A row for what is reached before, at the best and at the last epoch."""
    befores = [epochs[0] for epochs in runs["ours"]]
    before = [mean_recall(scores["validation"]) for scores in befores]

    def row(title: str, picked: list[dict]) -> list[str]:
        columns = zip(*(recalls(scores["validation"]) for scores in picked), strict=True)
        means = [mean_recall(scores["validation"]) for scores in picked]
        gains = [mean - base for mean, base in zip(means, before, strict=True)]
        retained = [mean_recall(scores["retention"]) for scores in picked]
        return [title, *map(over_seeds, columns), over_seeds(gains), over_seeds(retained)]

    rows = [
        row("before fine-tuning", befores),
        row("before, images as in followed", [epochs[0] for epochs in runs["followed"]]),
    ]
    for name, seeds in runs.items():
        best = [next(scores for scores in epochs if scores.get("best")) for epochs in seeds]
        rows.append(row(f"{name}, best epoch", best))
        rows.append(row(f"{name}, last epoch", [epochs[-1] for epochs in seeds]))
    print(f"\npercent, mean ± standard deviation over {len(before)} seeds\n")
    print_table(["", *RECALL_NAMES, "gain", "retention"], rows)


def plot(runs: dict[str, list[Epochs]], file: Path) -> None:
    """Mean recall epoch by epoch, a thin line a seed and a thick one for their mean: on the
    validation images, and on images of the pretraining."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    titles = {"validation": "Validation images", "retention": "Images of the pretraining"}
    for panel, (data, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, seeds in runs.items():
            lines = [[mean_recall(scores[data]) for scores in epochs] for epochs in seeds]
            for line in lines:
                panel.plot(line, color=COLOURS[name], alpha=0.35, linewidth=0.8)
            panel.plot(np.mean(lines, axis=0), "o-", color=COLOURS[name], label=name, markersize=4)
        before = mean(mean_recall(epochs[0][data]) for epochs in runs["ours"])
        panel.axhline(before, color="grey", linestyle="--", label="before fine-tuning")
        panel.set(title=title, xlabel="epoch", ylabel="mean recall, percent")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, file)


if __name__ == "__main__":
    run_script(main)
