"""The files that a run writes: weights, the checkpoint to go on from, tables and arguments."""

import csv
import os
from pathlib import Path
from typing import Any

from models import files
from models.clip import CLIP
from models.errors import InputError
from models.lora import merged
from models.open_clip_model import OpenClipModel
from models.weights.interface import save_archive
from models.weights.open_clip import CONFIG_FILE, to_open_clip
from models.weights.read import read_checkpoint_content
from utils.runs.files import atomic_write, writing

FORMAT = 11  # of checkpoint.pth; raised whenever its fields change


def save_weights(model: CLIP, path: Path) -> None:
    """Write float16 weights, low-rank changes merged, and open_clip's description beside them."""
    weights = {
        key: tensor.half() if tensor.is_floating_point() else tensor
        for key, tensor in merged(model.state_dict()).items()
    }
    write_json(path.with_name(CONFIG_FILE), to_open_clip(model.config))
    if isinstance(model, OpenClipModel):
        with writing(path):
            model.save_tokenizer(path.parent)
    _save(weights, path)


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write the state of a run: numbers, strings, lists, dicts and tensors."""
    _save({"format": FORMAT, **state}, path)


def _save(content: dict[str, Any], path: Path) -> None:
    with writing(path), atomic_write(path) as temporary:
        save_archive(content, temporary)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote to `path`; None for another file. Raises `InputError` for
    another format and for damaged tensors."""
    path = Path(path).expanduser()
    if not path.is_file():
        return None
    try:
        state = read_checkpoint_content(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if state and state["format"] != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {state['format']}, where this program reads {FORMAT}; "
            "continue it with the version that wrote it, or start anew from its weights"
        )
    return state


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table with a header line; what a row lacks stays empty."""
    columns = {name: None for row in reversed(rows) for name in row}
    with (
        writing(path),
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of `write_csv`, without empty fields."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON, by an atomic write."""
    with writing(path), atomic_write(path) as temporary:
        files.write_json(temporary, content)
