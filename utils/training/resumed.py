"""The checkpoint that a run goes on from, checked before anything is changed."""

from collections.abc import Set
from pathlib import Path
from typing import Any

from models.clip import CLIP
from models.clip_utils import build_model
from models.errors import InputError, listed
from models.weights.architecture import check_keys
from models.weights.open_clip import any_description
from utils.runs.checkpoint import read_checkpoint
from utils.training.layer_groups import freeze_and_adapt

REMEDY = "take an earlier copy of the run, or start a new one from its weights"


def read_resumed(path: str, names: Set[str]) -> dict[str, Any] | None:
    """The checkpoint at `path` with a CLIP as its `model`; None for another file. Raises
    `InputError` if its arguments have other `names`, or its weights do not fit its description."""
    state = read_checkpoint(path)
    if state is None:
        return None
    try:
        if wrong := state["arguments"].keys() ^ names:
            raise InputError(f"arguments missing or unknown: {listed(sorted(wrong))}")
        state["model"] = _model(state, Path(path).expanduser().parent)
    except InputError as error:
        raise InputError(f"{Path(path)}: {error}; {REMEDY}") from None
    return state


def _model(state: dict[str, Any], folder: Path) -> CLIP:
    """The model of the run whose checkpoint lies in `folder`, frozen and adapted as there."""
    weights, arguments = state["model"], state["arguments"]
    plain = {name: tensor for name, tensor in weights.items() if ".lora." not in name}
    model = build_model(plain, any_description(state["config"], folder))
    freeze_and_adapt(model, *(arguments[name] for name in ("lock_image", "lock_text", "lora")))
    check_keys(weights, model.state_dict())
    model.load_state_dict(weights)
    return model
