"""`load`, `build_model` and `create_model`; as a script, weights to download or to list."""

import os
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Python looks for modules in this folder only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.clip import CLIP
from models.config import CONTEXT_LENGTH, Config, check_config
from models.device import moved, pick_device
from models.errors import InputError, listed, near_names
from models.host import run_script
from models.open_clip_model import OpenClipConfig, OpenClipModel
from models.preprocess import Preprocess
from models.run_files import run_weights, runs_in
from models.scripts import ArgumentParser, from_here
from models.tokens import clip_tokenizer, token_rows
from models.weights import hub
from models.weights.architecture import (
    check_finite,
    check_keys,
    check_resolution,
    infer_config,
    resize_positional_embedding,
)
from models.weights.formats import read_weights
from models.weights.registry import CONFIGS, SHA256, weights_filename

MODELS_PTH = Path(__file__).with_name("models_pth")
HELP = """
examples:
  python models/clip_utils.py --list
  python models/clip_utils.py --model ViT-B/16

kinds of names:
  ViT-B/16                           OpenAI's name
  ViT-B-32/laion2b_s34b_b79k         open_clip's name
  openai/clip-vit-base-patch32       any CLIP on the hub
  hf-hub:timm/resnet50_clip.openai   as open_clip writes it
  ViT-B-16-SigLIP/webli              built by open_clip

Where the list says open_clip in place of the activation, that library builds
the model: pip install open_clip_torch

All scripts take these names, and download missing weights: those on the hub to
the cache of the library huggingface_hub. Its environment variables:
  HF_HOME             another folder for the cache
  HF_ENDPOINT         address of a mirror, such as https://<mirror>
  HF_HUB_DISABLE_XET  1: where a mirror has the small files alone
  HF_HUB_OFFLINE      1: use the cache only, download nothing
  HF_TOKEN            for repositories that are private or ask for consent
"""


def create_model(name: str, input_shape: int | None = None) -> CLIP:
    """The model of `CONFIGS` with that name and random weights, for training from scratch;
    `input_shape` is another image resolution, in pixels. `InputError` if there is none such."""
    if name not in CONFIGS:
        names = f"{near_names(name, CONFIGS)}; the names are {', '.join(CONFIGS)}"
        raise InputError(f"no model is called {name!r}{names}")
    config = CONFIGS[name]
    if input_shape is not None:
        check_resolution(config, input_shape)
        config = replace(config, image_resolution=input_shape)
    return CLIP(config).initialize()


def find_weights(name: str | os.PathLike, download_root: str | os.PathLike = MODELS_PTH) -> Path:
    """The file or folder of the weights `name`, a name or a path as for `load`; in the folder of a
    run, the weights that count. Missing weights are downloaded, OpenAI's to `download_root`, others
    to the cache of the Hugging Face hub. Raises `InputError` if that fails, or for another name."""
    if name in SHA256:
        return hub.fetch_published(name, Path(download_root).expanduser() / weights_filename(name))
    check_name(name)
    path = Path(name).expanduser()
    return (run_weights(path) or path) if path.exists() else hub.fetch(str(name))


def check_name(name: str | os.PathLike) -> None:
    """Raise `InputError` if `name` is neither a name of weights nor a path. Asks no server."""
    path = Path(name).expanduser()
    if name in SHA256 or path.is_file() or run_weights(path) or hub.repository_of(str(name)):
        return
    runs = runs_in(path if path.is_dir() else path.parent)
    if path.is_dir() and (not runs or any(map(Path.is_file, path.iterdir()))):
        return  # weights, perhaps with runs below them
    if name in CONFIGS:
        train = f"python {from_here('train.py')} --resume_training none --model {name}"
        raise InputError(f"{name}: has no published weights; to train it: {train}")
    if runs:
        raise InputError(f"{name}: no run with weights; those here are {listed(runs)}")
    beside = map(str, path.parent.iterdir()) if path.parent.is_dir() else []
    near = near_names(str(name), [*CONFIGS, *hub.HUB, *beside])
    raise InputError(
        f"{name}: neither a file nor the name of published weights{near}; the names are "
        f"{', '.join(SHA256)}, more that python {from_here('models/clip_utils.py')} --list shows, "
        "and OWNER/NAME of a repository on the Hugging Face hub"
    )


def load(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike = MODELS_PTH,
    input_shape: int | None = None,
    activation: str | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model with trained weights, in float32 and evaluation mode, and its preprocessing.

    - `name`: OpenAI's name of a model (`"ViT-B/32"`); open_clip's (`"ViT-B-32/laion2b_s34b_b79k"`);
      a repository of the Hugging Face hub (`"openai/clip-vit-base-patch32"`, also with `hf-hub:`);
      or, first of all, a path, see `read_weights`. Other towers than ours are built by open_clip.
    - `device`: see `pick_device`.
    - `download_root`: the folder for OpenAI's weights.
    - `input_shape`: another image resolution, in pixels.
    - `activation`: `"quick_gelu"` or `"gelu"`, for a state dict without a description.

    Raises `InputError` if the weights are not available, or not those of a CLIP model.
    """
    device = pick_device(device)
    model = read_model(find_weights(name, download_root), activation, input_shape)
    return moved(model, device), model.preprocess


def read_model(path: Path, activation: str | None = None, input_shape: int | None = None) -> CLIP:
    """The model of the weights at `path`, on the CPU. The arguments are those of `load`."""
    try:
        return build_model(*read_weights(path, activation), input_shape=input_shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def build_model(
    state_dict: dict[str, Tensor],
    config: Config | OpenClipConfig | None = None,
    input_shape: int | None = None,
) -> CLIP:
    """A float32 CLIP in evaluation mode with these weights. Without a `config`, the sizes are
    inferred from the shapes of the weights; the rest is as in the published models (QuickGELU,
    heads of width 64, preprocessing). `input_shape` is another image resolution, in pixels, to
    which the positional embedding of the image tower is interpolated. Raises `InputError` if the
    weights do not fit, hold NaN or infinity, or for an impossible resolution."""
    config = config or infer_config(state_dict)
    weights = {key: t.float() if t.is_floating_point() else t for key, t in state_dict.items()}
    is_own = not isinstance(config, OpenClipConfig)
    if is_own:
        check_config(config)
        with torch.device("meta"):  # parameters without memory, to be replaced by the weights
            model = CLIP(config)
    else:
        model = OpenClipModel(config)
        side = model.visual.input_resolution
        if input_shape not in (None, side):
            raise InputError(f"this model takes images of {side} pixels, not of {input_shape}")
    check_keys(weights, model.state_dict())
    check_finite(weights)
    if is_own and input_shape is not None and input_shape != config.image_resolution:
        weights = resize_positional_embedding(weights, config, input_shape)
        with torch.device("meta"):
            model = CLIP(replace(config, image_resolution=input_shape))
    model.load_state_dict(weights, assign=True)
    return model.eval()


def tokenize(
    texts: str | list[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> Tensor:
    """n texts -> int32 ids `[n, context_length]` of the published models, see `token_rows`."""
    return token_rows(clip_tokenizer(), texts, context_length, truncate)


def list_models() -> None:
    """Print a table of all weights that have a name."""
    row = "{:<52} {:<19} {:>8} {:>6} {}".format
    print(row("name", "trained on", "M params", "pixels", "activation"))
    for name in (*SHA256, *hub.HUB):
        _, _, data, size, side, activation = hub.HUB.get(name) or hub.published_copy(name)
        print(row(name, data, size, side, activation or "open_clip"))


def main() -> None:
    about = "Download weights of a CLIP and print their path, or list all that have a name."
    parser = ArgumentParser(description=about, epilog=HELP)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", metavar="NAME", help="weights to download: a name of the list, or "
                      "OWNER/NAME of a repository on the Hugging Face hub")  # fmt: skip
    task.add_argument("--list", action="store_true", help="list the names and training data")
    args = parser.parse_args()
    if args.list:
        list_models()
    else:
        print(find_weights(args.model, MODELS_PTH))


if __name__ == "__main__":
    run_script(main)
