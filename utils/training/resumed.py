"""The checkpoint that a run goes on from, checked before anything is changed."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import CLIP
from models.clip_utils import build_model
from models.errors import InputError, listed, one_line
from models.weights.architecture import check_keys
from models.weights.open_clip import any_description
from utils.runs.checkpoint import read_checkpoint
from utils.training.layer_groups import freeze_and_adapt
from utils.training.optimizer import parameter_groups

REMEDY = "take an earlier copy of the run, or start a new one from its weights"
FIELDS = {"format", "arguments", "data", "start", "rows", "best_since", "losses", "baseline",
          "lost", "restarts", "config", "model", "average", "optimizer", "scaler"}  # fmt: skip


def read_resumed(path: str, parser: argparse.ArgumentParser) -> dict[str, Any] | None:
    """The checkpoint at `path` with a CLIP as its `model`; None for another file. Raises
    `InputError` if fields, arguments (those of `parser`), keys or shapes are not as saved."""
    state = read_checkpoint(path)
    if state is None:
        return None
    try:
        _check_names("fields", state, FIELDS)
        _check_names("arguments", state["arguments"], vars(parser.parse_args([])))
        state["model"] = _model(state, Path(path).expanduser().parent)
        _check_average(state["average"], state["model"])
        _check_moments(state["optimizer"]["state"], state["model"], state["arguments"])
    except InputError as error:
        raise InputError(f"{Path(path)}: {error}; {REMEDY}") from None
    except Exception as error:  # a damaged file can break its reader in any way
        raise InputError(f"{Path(path)}: damaged ({one_line(error)}); {REMEDY}") from None
    return state


def _check_names(what: str, found: dict[str, Any], expected: set[str] | dict[str, Any]) -> None:
    if wrong := found.keys() ^ set(expected):
        raise InputError(f"{what} missing or unknown: {listed(sorted(wrong, key=str))}")


def _model(state: dict[str, Any], folder: Path) -> CLIP:
    """The model of the run whose checkpoint lies in `folder`, frozen and adapted as there."""
    weights, arguments = state["model"], state["arguments"]
    try:
        plain = {name: tensor for name, tensor in weights.items() if ".lora." not in name}
        model = build_model(plain, any_description(state["config"], folder))
        freeze_and_adapt(model, *(arguments[name] for name in ("lock_image", "lock_text", "lora")))
        check_keys(weights, model.state_dict())
    except InputError as error:
        raise InputError(f"model: {error}") from None
    model.load_state_dict(weights)
    return model


def _check_average(average: dict[str, Tensor] | None, model: CLIP) -> None:
    if average is None:
        return
    expected = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    try:
        check_keys(average, expected | {"n_averaged": torch.tensor(0)})
    except InputError as error:
        raise InputError(f"average: {error}") from None


def _check_moments(
    moments: dict[int, dict[str, Tensor]], model: CLIP, arguments: dict[str, Any]
) -> None:
    """Raise `InputError` for moments of other shapes than their parameters."""
    groups = parameter_groups(model, 0.0, 0.0, arguments["layer_decay"])
    parameters = [parameter for group in groups for parameter in group["params"]]
    for number, of_parameter in moments.items():
        shape = parameters[number].shape
        for name, tensor in of_parameter.items():
            if name != "step" and tensor is not None and tensor.shape != shape:
                raise InputError(
                    f"optimizer: {name} of parameter {number} is {list(tensor.shape)}, "
                    f"not {list(shape)}"
                )
