"""The files that a run writes: weights, the checkpoint to go on from, tables and arguments."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch

from models.clip import CLIP
from models.errors import InputError
from models.weights.file_kind import is_torchscript
from utils.runs.files import replaced_whole

FORMAT = 4  # of checkpoint.pth; raised whenever an older program could not read it


def save_weights(model: CLIP, path: Path) -> None:
    """The model's state dict with floats as float16: half the size, and enough to predict."""
    weights = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }
    _save(weights, path)


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write everything needed to continue a run: numbers, strings, lists, dicts and tensors."""
    _save({"format": FORMAT, **state}, path)


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        with replaced_whole(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        # When a file cannot be written, torch reports a failed check of its own, not the reason.
        if not isinstance(error, OSError) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "no room on the disk"
        raise InputError(
            f"{path}: cannot be written ({reason}); the earlier file is kept. Make room, then go "
            "on with --resume_training RUN/weights/checkpoint.pth"
        ) from error


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote to `path`; None if the file is something else. Raises
    `InputError` for a checkpoint of another format."""
    path = Path(path).expanduser()
    if not path.is_file() or is_torchscript(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # not a checkpoint; the reader of weights will say what it is
        return None
    if not isinstance(state, dict) or "format" not in state or "optimizer" not in state:
        return None
    if state["format"] != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {state['format']}, where this program reads {FORMAT}; "
            "continue it with the version that wrote it, or start anew from its weights"
        )
    return state


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table with a header line; all of it, so that it always agrees with the checkpoint.
    The columns are those of the last row; what an earlier row lacks stays empty."""
    with replaced_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with replaced_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
