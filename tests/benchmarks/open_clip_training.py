"""Training by open_clip's own program, on the data and from the weights that ours has.

    pip install 'open_clip_torch[training]'

It reads CSV data, a row a caption. Its text tower is given as many tokens as the longest caption
has, which changes no output and saves it time.
"""

import csv
from pathlib import Path

import torch
from runs import call

from models.weights.registry import CONFIGS
from utils.data.annotations import caption_file, read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.runs.checkpoint import write_json
from utils.runs.files import atomic_write

MODEL = "ViT-demo"
WARMUP = 0.1  # share of the run, as in train.py; open_clip's 10,000 steps are more than there are
PROGRAM = (  # open_clip_train.main takes no model of a file but those that are registered
    "import sys, open_clip; from open_clip_train.main import main; "
    "open_clip.add_model_config(sys.argv[1]); main(sys.argv[2:])"
)


def train_open_clip(
    data: Path,
    folder: Path,
    name: str,
    *arguments: object,
    batch_size: int,
    epochs: int,
    seed: int,
    start: Path | None = None,
) -> Path:
    """The last weights of a run `folder/name` on the English captions of `data`, from random
    weights or from those of ours in the file `start`. One that was broken off goes on."""
    length = longest_caption(data)
    write_model_config(folder / f"{MODEL}.json", length)
    if start:
        arguments = (*arguments, "--pretrained", cut_context(start, length, folder / "start.pt"))
    return train_csv(
        data, folder, name, "--model", MODEL, *arguments,
        batch_size=batch_size, epochs=epochs, seed=seed,
    )  # fmt: skip


def train_csv(
    data: Path, folder: Path, name: str, *arguments: object, batch_size: int, epochs: int, seed: int
) -> Path:
    """The last weights of a run `folder/name` with these arguments; the models that `folder`
    describes are known. One that was broken off goes on."""
    rows = write_csv(data, folder / "train.csv")
    steps = epochs * (rows // batch_size)
    call(
        *("-c", PROGRAM, folder, "--train-data", folder / "train.csv", "--dataset-type", "csv"),
        *("--batch-size", batch_size, "--epochs", epochs, "--warmup", round(WARMUP * steps)),
        *("--workers", 0, "--device", "cpu", "--precision", "fp32", "--seed", seed),
        *("--logs", folder, "--name", name, "--resume", "latest", *arguments),
    )
    return folder / name / "checkpoints" / f"epoch_{epochs}.pt"


def write_csv(data: Path, file: Path) -> int:
    """A row for every caption, as open_clip reads them: filepath, tab, title. Returns their
    number."""
    rows = [
        (data.resolve() / image, caption)
        for image, captions in read_annotations(caption_file(data, "en", "train"))
        for caption in captions
    ]
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows(rows)
    return len(rows)


def longest_caption(data: Path) -> int:
    """Tokens of the longest English caption of any split, start and end included."""
    lists = {split: caption_file(data, "en", split) for split in ("train", "val", "test")}
    sets = (Flickr8kDataset(data, split=split) for split, file in lists.items() if file.is_file())
    return max(int(dataset.tokens[:].argmax(dim=1).max()) + 1 for dataset in sets)


def write_model_config(file: Path, context_length: int) -> None:
    """The architecture as open_clip describes one; its name is that of the file."""
    config = CONFIGS[MODEL]
    description = {
        "embed_dim": config.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": config.image_resolution,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "patch_size": config.vision_patch_size,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": config.vocab_size,
            "width": config.transformer_width,
            "heads": config.transformer_heads,
            "layers": config.transformer_layers,
        },
    }
    write_json(file, description)


def cut_context(weights: Path, context_length: int, file: Path) -> Path:
    """Our weights without the positions that no caption reaches."""
    state = torch.load(weights, weights_only=True)
    state["positional_embedding"] = state["positional_embedding"][:context_length].clone()
    with atomic_write(file) as temporary:
        torch.save(state, temporary)
    return file
