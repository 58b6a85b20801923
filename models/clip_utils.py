"""`load` gives a model with its weights; `tokenize` turns texts into the token ids it takes.

As a script this file downloads weights, or lists the models:

    python models/clip_utils.py --model ViT-B/16
    python models/clip_utils.py --list
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Python looks for modules in this folder only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.clip import CLIP, build_model
from models.device import pick_device
from models.errors import InputError, run_script
from models.files import check_regular
from models.preprocess import Preprocess
from models.scripts import from_here
from models.tokens import clip_tokenizer, token_rows
from models.weights.architecture import check_resolution
from models.weights.download import download
from models.weights.registry import (
    CONFIGS,
    CONTEXT_LENGTH,
    SHA256,
    available_models,
    near_names,
    weights_filename,
    weights_url,
)
from models.weights.sources import read_weights

MODELS_PTH = Path(__file__).with_name("models_pth")


def create_model(name: str, input_shape: int | None = None) -> CLIP:
    """A model with random weights, for training from scratch.

    `name` is one of `CONFIGS`; `input_shape` is another image resolution, in pixels. Raises
    `InputError` for an unknown name and for a resolution that the model cannot have.
    """
    if name not in CONFIGS:
        near = near_names(name, CONFIGS)
        known = ", ".join(CONFIGS)
        raise InputError(f"no model is called {name!r}{near}; the names are {known}")
    config = CONFIGS[name]
    if input_shape is not None:
        check_resolution(config, input_shape)
        config = replace(config, image_resolution=input_shape)
    return CLIP(config).initialize()


def find_weights(name: str | os.PathLike, download_root: str | os.PathLike = MODELS_PTH) -> Path:
    """The weights that `name` stands for, a file or a folder: the name of a model, or a path. The
    folder of a run stands for its best weights.

    The published weights of a model are downloaded to the folder `download_root` if they are not
    there yet. Raises `InputError` if `name` is neither, or if the download fails.
    """
    if name in SHA256:
        path = Path(download_root).expanduser() / weights_filename(name)
        return download(weights_url(name), path, SHA256[name])
    check_name(name)
    path = Path(name).expanduser()
    best = path / "weights" / "best_epoch_weights.pth"
    if best.is_file():
        return best
    if not path.is_dir():
        check_regular(path)
    return path


def check_name(name: str | os.PathLike) -> None:
    """Raise `InputError` for what is neither the name of published weights nor a path."""
    if name not in SHA256 and not Path(name).expanduser().exists():
        near = near_names(str(name), CONFIGS)
        known = ", ".join(available_models())
        raise InputError(
            f"{name}: neither a file nor the name of published weights{near}; the names are "
            f"{known} (ViT-demo has no published weights; to train it: {_train('ViT-demo')})"
        )


def load(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike = MODELS_PTH,
    input_shape: int | None = None,
    activation: str | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model with trained weights, in float32 and evaluation mode, and its preprocessing.

    - `name`: the name of a model, such as `"ViT-B/32"`, or the path of weights. That may be a
      published TorchScript archive, a state dict (.pt, .pth or .safetensors, in float16 or
      float32), a checkpoint of `train.py`, open_clip or cn_clip, or a folder of open_clip or
      transformers.
    - `device`: `pick_device` chooses the default.
    - `download_root`: the folder for published weights.
    - `input_shape`: another image resolution than that of the weights, in pixels.
    - `activation`: `"quick_gelu"` or `"gelu"`, for a state dict without a description beside it.

    Raises `InputError` if the weights cannot be had, or are not those of a CLIP model.
    """
    device = pick_device(device)
    model = read_model(find_weights(name, download_root), activation, input_shape).to(device)
    return model, model.preprocess


def read_model(path: Path, activation: str | None = None, input_shape: int | None = None) -> CLIP:
    """The model of the weights at `path`, on the CPU. The arguments are those of `load`."""
    try:
        return build_model(*read_weights(path, activation), input_shape=input_shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def tokenize(
    texts: str | list[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> Tensor:
    """n texts -> int32 token ids `[n, context_length]` for the published models, as `token_rows`
    makes them. `model.tokenize` does it for any model, by its own tokenizer."""
    return token_rows(clip_tokenizer(), texts, context_length, truncate)


def list_models(download_root: str | os.PathLike = MODELS_PTH) -> None:
    """Print a table of the models: name, number of channels of a feature, image resolution in
    pixels, and where the weights are. That is the file if it has been downloaded, else the web
    address; for a model without published weights it is the command that trains it."""
    print(f"{'model':15} {'embed dim':>9} {'resolution':>10}  weights")
    for name, config in CONFIGS.items():
        path = Path(download_root).expanduser() / weights_filename(name)
        if name not in SHA256:
            weights = f"none published: {_train(name)}"
        else:
            weights = path if path.exists() else weights_url(name)
        print(f"{name:15} {config.embed_dim:9} {config.image_resolution:10}  {weights}")


def _train(name: str) -> str:
    """The command that trains a model from scratch."""
    return f"python {from_here('train.py')} --resume_training none --model {name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Download published CLIP weights; a broken-off download is continued."
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", choices=available_models(), help="the model to download")
    task.add_argument(
        "--list",
        action="store_true",
        help="list the models, each with its weights file, or the address if it is not downloaded",
    )
    parser.add_argument(
        "--download_root", default=MODELS_PTH, help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.list:
        list_models(args.download_root)
    else:
        print(find_weights(args.model, args.download_root))


if __name__ == "__main__":
    run_script(main)
