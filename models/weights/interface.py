"""The interface of a weights format, and the writing of its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.clip import CLIP
from models.config import Config
from models.files import write_json

Weights = dict[str, Tensor]


class Format(NamedTuple):
    """A format of weights. `write(model, output, dtype)` raises `InputError` for a model that the
    format cannot hold. A folder or a repository on the hub has one of `files` (names or glob
    patterns of weights), the first of `descriptions`, and perhaps the others."""

    purpose: str
    opened_by: str  # Python code with {0} for the path, {clip} and {tokenizer} for class names
    write: Callable[[CLIP, Path, torch.dtype], None]
    check: Callable[[], object] = lambda: None  # before anything is read
    files: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    recognises: Callable[[Weights], bool] = lambda weights: False  # by the keys
    to_ours: Callable[[Weights], Weights] = lambda weights: weights
    description: Callable[[Path], Config | None] = lambda folder: None


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


def write_tokenizer(model: CLIP, folder: Path) -> None:
    """Write the files that transformers' tokenizer reads."""
    for name, content in model.tokenizer.transformers_files(model.context_length).items():
        if isinstance(content, str):
            (folder / name).write_bytes(content.encode())
        else:
            write_json(folder / name, content)


def save_archive(content: dict[str, Any], file: Path) -> None:
    """`torch.save`; on a full disk it raises `OSError`, where torch fails a check of its own."""
    try:
        # Given a path, torch would name the archive's root after it: other bytes each time.
        with file.open("wb") as opened:
            torch.save(content, opened)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
