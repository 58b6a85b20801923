"""One .safetensors file with our keys, and the description of its model in the metadata."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.clip import CLIP
from models.weights.interface import Format, save_safetensors
from models.weights.open_clip import CONFIG_FILE, to_open_clip


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a file of any program, and open_clip's description if the file has one."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(CONFIG_FILE)
    return load_file(path), json.loads(text) if text else None


def write(model: CLIP, file: Path, dtype: torch.dtype) -> None:
    description = json.dumps(to_open_clip(model.config))
    save_safetensors(model.state_dict(), file, dtype, **{CONFIG_FILE: description})


FORMAT = Format(
    "one file to keep or to pass on, with the description of its model",
    """
    from models import load
    load("{0}")
    """,
    write,
)
