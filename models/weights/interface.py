"""The interface of a weights format, and the writing of its files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.clip import CLIP
from models.config import Config

if TYPE_CHECKING:
    from models.weights.hub import Repository

Weights = dict[str, Tensor]


class Format(NamedTuple):
    """A format of weights; `models.weights.formats.FORMATS` lists all.

    `write(model, output, dtype)` raises `InputError` for a model that the format cannot hold.
    `files` are the names or glob patterns of the weights in a folder. `fetch` returns the folder
    of a repository on the hub, with all that is read of it, or None if the repository has no such
    weights; `hub_files` names these files in messages.
    """

    purpose: str
    opened_by: str  # Python code with {0} for the path, {clip} and {tokenizer} for class names
    write: Callable[[CLIP, Path, torch.dtype], None]
    check: Callable[[Path], object] = lambda output: None  # before anything is read
    files: tuple[str, ...] = ()
    recognises: Callable[[Weights], bool] = lambda weights: False  # by the keys
    to_ours: Callable[[Weights], Weights] = lambda weights: weights
    description: Callable[[Path, Weights], Config | None] = lambda folder, weights: None
    fetch: Callable[["Repository"], Path | None] = lambda repository: None
    hub_files: str = ""


def save_safetensors(weights: Weights, file: Path, dtype: torch.dtype, **metadata: str) -> None:
    """Write weights to `file`, floats as `dtype`."""
    file.touch()
    mode = file.stat().st_mode  # safetensors lets nobody but the owner read
    save_file(cast(weights, dtype), file, metadata={"format": "pt"} | metadata)
    file.chmod(mode)


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights with floats as `dtype`."""
    return {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in weights.items()
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(model: CLIP, folder: Path) -> None:
    """Write the files that transformers' tokenizer reads."""
    for name, content in model.tokenizer.transformers_files(model.context_length).items():
        if isinstance(content, str):
            (folder / name).write_bytes(content.encode())
        else:
            write_json(folder / name, content)
