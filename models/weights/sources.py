"""Weights with the description of their model, from a file or a folder of any usual format."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from models.errors import InputError
from models.files import read_bytes
from models.lora import merged
from models.weights import open_clip, transformers
from models.weights.architecture import infer_config
from models.weights.config import Config
from models.weights.file_kind import is_torchscript, one_line
from models.weights.read import read_state_dict

TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
UNTOLD = (
    "a state dict does not tell its activation; put the description of the model beside it "
    f"({open_clip.CONFIG_FILE}), or give --activation: quick_gelu for weights of OpenAI, MetaCLIP "
    "and DFN and what was tuned from them, gelu for those of LAION, DataComp and most others"
)


def read_weights(path: Path, activation: str | None = None) -> tuple[dict[str, Tensor], Config]:
    """The weights at `path` with our keys, and the description of their model.

    A folder holds open_clip_config.json or transformers' config.json, and beside it the weights, in
    one file or, in transformers' format, in several. The description of a file is one that lies
    beside it; published TorchScript archives need none. `activation` (gelu or quick_gelu) is for a
    state dict without description, since it cannot be told by weights. Raises `InputError` for what
    is missing, damaged or of another kind of model; the caller names `path`.
    """
    if path.is_dir():
        weights = _read_folder(path)
        folder = path
    else:
        weights, folder = merged(read_state_dict(path)), path.parent
    if transformers.is_transformers(weights):
        content = _description(folder / transformers.CONFIG_FILE)
        weights = transformers.from_transformers(weights)
        if content is not None:
            preprocessor = _description(folder / transformers.PREPROCESSOR_FILE) or {}
            return weights, transformers.config_from_transformers(content, preprocessor)
    elif path.is_file() and is_torchscript(path):
        return weights, infer_config(weights)
    else:
        content = _description(folder / open_clip.CONFIG_FILE)
        if content is not None:
            return weights, open_clip.from_open_clip(content)
    config = infer_config(weights)
    if (folder.parent / "arguments.json").is_file():  # a run from before there were descriptions
        return weights, config
    if activation is None:
        raise InputError(UNTOLD)
    return weights, replace(config, activation=activation)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in the first file of a usual name, or in all that an index lists."""
    names = (*open_clip.WEIGHTS_FILES, *TRANSFORMERS_WEIGHTS)
    for name in names:
        if (folder / name).exists():
            return read_state_dict(folder / name)
        index = _description(folder / f"{name}.index.json")
        if index is not None:
            return _read_shards(folder, index)
    raise InputError(f"a folder without weights; one of these should be in it: {', '.join(names)}")


def _read_shards(folder: Path, index: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in the files that an index of transformers lists."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError("its index of weights lists no files (weight_map)")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(map(str, table.values()))):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"its part {one_line(name)} is missing; download it as well")
        weights |= read_state_dict(folder / name)
    return weights


def _description(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file."""
    if not file.exists():
        return None
    try:
        content = json.loads(read_bytes(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name}: broken JSON ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file.name}: should hold the description of a model")
    return content
