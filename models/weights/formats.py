"""The formats of weights, each in its module; reading of weights in any of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from models.clip import text_tower
from models.config import Config
from models.errors import InputError, naming
from models.files import read_json
from models.lora import merged
from models.open_clip_model import OpenClipConfig
from models.weights import cn_clip, onnx, open_clip, peft, safetensors_file, transformers
from models.weights.architecture import infer_config
from models.weights.read import read_file

FORMATS = {
    "open_clip": open_clip.FORMAT,
    "transformers": transformers.FORMAT,
    "cn_clip": cn_clip.FORMAT,
    "safetensors": safetensors_file.FORMAT,
    "onnx": onnx.FORMAT,
}
FILES = [name for each in FORMATS.values() for name in each.files]
UNTOLD = (
    "a state dict does not tell its activation; put the description of the model beside it "
    f"({open_clip.CONFIG_FILE}), or give --activation: quick_gelu for weights of OpenAI, MetaCLIP "
    "and DFN, what was tuned from them, and runs of this program before it wrote descriptions; "
    "gelu for those of LAION, DataComp and most others"
)


def read_weights(
    path: Path, activation: str | None = None
) -> tuple[dict[str, Tensor], Config | OpenClipConfig]:
    """The weights at `path` with our keys, and the description of their model. A folder holds
    weights of one of `FORMATS`, in one file or in several with an index, and their description; or
    an adapter of peft. The description of a file is in it, see `read_file`, or lies beside it; one
    of cn_clip needs none. `activation` is for a state dict without a description. `InputError`s do
    not name `path`."""
    if (path / peft.CONFIG_FILE).exists():
        with peft.merged_folder(path) as folder:
            return read_weights(folder)
    folder = path if path.is_dir() else path.parent
    weights, own = (_read_folder(path), None) if path.is_dir() else read_file(path)
    weights = merged(weights)
    kind = next((f for f in FORMATS.values() if f.recognises(weights)), open_clip.FORMAT)
    weights = kind.to_ours(weights)
    config = open_clip.any_description(own, folder) if own is not None else kind.description(folder)
    if config is None:
        config = infer_config(weights)
        if activation is None and config.text_tower != "bert":  # all of cn_clip have QuickGELU
            raise InputError(UNTOLD)
        config = replace(config, activation=activation or config.activation)
    if isinstance(config, OpenClipConfig):
        return open_clip.with_towers(weights), config
    tower = text_tower(config)
    if config.vocab_size != tower.vocabulary:
        raise InputError(
            f"its tokenizer has {config.vocab_size:,} tokens, not the {tower.vocabulary:,} of the "
            f"{tower.transformers_tokenizer} here; take another model"
        )
    return weights, config


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in the first file of a usual name, or in all that an index lists."""
    for name in FILES:
        for file in sorted(folder.glob(name)):
            with naming(file.name):
                return read_file(file)[0]
        if index := read_json(folder / f"{name}.index.json"):
            weights: dict[str, Tensor] = {}
            for part in shards(index):
                with naming(part):
                    weights |= read_file(folder / part)[0]
            return weights
    raise InputError(f"a folder without weights; give a file, or add one of {', '.join(FILES)}")


def shards(index: dict[str, Any]) -> list[str]:
    """The files beside an index of transformers that it lists."""
    return sorted(set(index.get("weight_map", {}).values()))
