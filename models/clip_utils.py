"""The published models: their names, how to get them, and what goes in.

As a script it downloads weights: `python models/clip_utils.py --model ViT-B/16`, or `--list`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from models.clip import CLIP, build_model, check_resolution
from models.download import download
from models.errors import InputError, run_script
from models.preprocess import Preprocess
from models.simple_tokenizer import SimpleTokenizer
from models.weights_file import read_state_dict

MODELS_PTH = Path(__file__).with_name("models_pth")
BASE_URL = "https://openaipublic.azureedge.net/clip/models"
CONTEXT_LENGTH = 77
TRAIN_DEMO = "python train.py --resume_training none --model ViT-demo"
SHOWN = 60  # characters of a text that an error message shows

SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def _architecture(embed, resolution, layers, width, patch, text_width, text_layers=12) -> dict:
    return {
        "embed_dim": embed,
        "image_resolution": resolution,
        "vision_layers": layers,
        "vision_width": width,
        "vision_patch_size": patch,
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 49408,
        "transformer_width": text_width,
        "transformer_heads": text_width // 64,
        "transformer_layers": text_layers,
    }


ARCHITECTURES = {
    "RN50": _architecture(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _architecture(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _architecture(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _architecture(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _architecture(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _architecture(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _architecture(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _architecture(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _architecture(768, 336, 24, 1024, 14, 768),
    # Ours: small enough to train on a CPU in minutes; there are no published weights for it.
    "ViT-demo": _architecture(256, 64, 3, 192, 16, 128, text_layers=3),
}


def available_models() -> list[str]:
    """The names of the models with published weights."""
    return list(SHA256)


def create_model(name: str, input_shape: int | None = None) -> CLIP:
    """A model of a registered architecture with random weights, for training from scratch."""
    if name not in ARCHITECTURES:
        near = near_names(name, ARCHITECTURES)
        raise InputError(f"no model is called {name!r}{near}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[name]
    if input_shape is not None:
        check_resolution(architecture, input_shape)
        architecture = architecture | {"image_resolution": input_shape}
    return CLIP(**architecture).initialize()


def near_names(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for the known names that are much like `name`, whatever their case."""
    by_lower = {known_name.lower(): known_name for known_name in known}
    near = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.7)
    return f"; did you mean {' or '.join(by_lower[match] for match in near)}?" if near else ""


def weights_url(name: str) -> str:
    """Where the published weights of `name` are; the folder is the file's SHA-256."""
    return f"{BASE_URL}/{SHA256[name]}/{weights_filename(name)}"


def weights_filename(name: str) -> str:
    """The published file's name: `ViT-L/14@336px` -> `ViT-L-14-336px.pt`."""
    return name.replace("/", "-").replace("@", "-") + ".pt"


def find_weights(name: str | os.PathLike, download_root: str | os.PathLike = MODELS_PTH) -> Path:
    """The file for a registry name, downloaded if need be, or for a path, as it is."""
    if name in SHA256:
        path = Path(download_root).expanduser() / weights_filename(name)
        return download(weights_url(name), path, SHA256[name])
    path = Path(name).expanduser()
    if not path.exists():
        near = near_names(str(name), ARCHITECTURES)
        known = ", ".join(available_models())
        raise InputError(
            f"{name}: neither a file nor the name of published weights{near}; the names are "
            f"{known} (ViT-demo has no published weights: train it, {TRAIN_DEMO})"
        )
    return path


def load(
    name: str | os.PathLike,
    device: str | torch.device | None = None,
    download_root: str | os.PathLike = MODELS_PTH,
    input_shape: int | None = None,
) -> tuple[CLIP, Preprocess]:
    """A model with trained weights, float32, in evaluation mode, and its preprocessing.

    `name` is a registry name (`"ViT-B/32"`) or the path of a weights file: a published TorchScript
    archive, a state dict (.pt, .pth, .safetensors; float16 or float32), a checkpoint of `train.py`
    or of open_clip. `device=None`: CUDA if there is one, else the CPU. `input_shape`: another image
    resolution than the weights' own. Raises `InputError` for a file that holds no CLIP.
    """
    device = pick_device(device)
    path = find_weights(name, download_root)
    try:
        model = build_model(read_state_dict(path), input_shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return model.to(device), Preprocess(model.visual.input_resolution)


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; None: CUDA if there is one, else the CPU."""
    try:
        picked = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {device}: no such device; try cpu, cuda or cuda:1") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices here; use "
            "--device cpu, or install a torch built for CUDA"
        )
    return picked


@lru_cache
def tokenizer() -> SimpleTokenizer:
    """The one tokenizer, read from its file on first use."""
    return SimpleTokenizer()


def tokenize(
    texts: str | list[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> Tensor:
    """Texts -> IntTensor `[n, context_length]`: start token, text, end token, zeros.

    A text that does not fit raises `InputError` that names it; with `truncate` it is cut, and still
    ends with the end token.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    bpe = tokenizer()
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is no string but {type(text).__name__}: {text!r:.{SHOWN}}")
        ids = [bpe.start_of_text, *bpe.encode(text), bpe.end_of_text]
        if len(ids) > context_length:
            if not truncate:
                raise InputError(
                    f"text {i} has {len(ids)} tokens, where {context_length} fit: "
                    f"{text[:SHOWN]!r}{'...' if len(text) > SHOWN else ''}; "
                    "shorten it, or cut it with truncate=True"
                )
            ids[context_length - 1 :] = [bpe.end_of_text]
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    return tokens


def list_models(download_root: str | os.PathLike = MODELS_PTH) -> None:
    """Print each model: its sizes, and its file if it is there, else the address, or how to train
    the one that has no published weights."""
    print(f"{'model':15} {'embed dim':>9} {'resolution':>10}  weights")
    for name, sizes in ARCHITECTURES.items():
        path = Path(download_root).expanduser() / weights_filename(name)
        if name not in SHA256:
            weights = f"none published: {TRAIN_DEMO}"
        else:
            weights = path if path.exists() else weights_url(name)
        print(f"{name:15} {sizes['embed_dim']:9} {sizes['image_resolution']:10}  {weights}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Download published CLIP weights; a broken-off download is continued."
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", choices=available_models(), help="the model to download")
    task.add_argument(
        "--list",
        action="store_true",
        help="list the models, each with its file, or the address of one not yet downloaded",
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
