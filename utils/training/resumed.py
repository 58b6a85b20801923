"""The checkpoint that a run goes on from, checked before anything is changed.

What `Run.save_checkpoint` and `State.state_dict` write is what is taken, by field, type and range.
"""

import argparse
import math
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import CLIP, build_model
from models.errors import InputError
from models.weights.checks import check_finite, check_keys
from models.weights.file_kind import one_line
from models.weights.open_clip import from_open_clip
from utils.runs.arguments import check_values
from utils.runs.checkpoint import read_checkpoint
from utils.training.layer_groups import choose_what_learns
from utils.training.optimizer import parameter_groups

REMEDY = "take an earlier copy of the run, or start a new one from its weights"
FIELDS = ("arguments", "data", "start", "rows", "best_since", "losses", "config", "model",
          "average", "optimizer", "scaler")  # fmt: skip
SETTLED = ("lr", "warmup_epochs")  # arguments that have a value once a run starts
AT_THE_START = ("epoch", "val_loss", "mean_recall")
IN_EVERY_ROW = (*AT_THE_START, "train_loss")
MOMENTS = {
    "adam": {"step", "exp_avg", "exp_avg_sq"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "sgd": {"momentum_buffer"},
}
SCALER = {  # of the loss scale: type and range
    "scale": (float, 0, math.inf),
    "growth_factor": (float, 1, math.inf),
    "backoff_factor": (float, 0, 1),
    "growth_interval": (int, 0, math.inf),
    "_growth_tracker": (int, -1, math.inf),
}
LARGEST = 1e12  # of a loss, a score or a time
SHORT = reprlib.Repr()
SHORT.maxlevel = 1


def read_resumed(path: str, parser: argparse.ArgumentParser) -> dict[str, Any] | None:
    """The checkpoint at `path` with a CLIP as its `model`; None if the file is something else.
    Raises `InputError`, which names the file and the field, if no run of `parser`'s arguments could
    have written it."""
    state = read_checkpoint(path)
    if state is None:
        return None
    try:
        for field in FIELDS:
            _require(field in state, field, "is missing")
        _check_arguments(state["arguments"], parser)
        _check_history(state)
        state["model"] = _model(state["model"], state["config"], state["arguments"])
        _check_average(state["average"], state["model"])
        _check_optimizer(state["optimizer"], state["model"], state["arguments"])
        _check_scaler(state["scaler"])
    except InputError as error:
        raise InputError(f"{Path(path)}: {error}; {REMEDY}") from None
    return state


def _check_arguments(arguments: object, parser: argparse.ArgumentParser) -> None:
    _require(isinstance(arguments, dict), "arguments", _is_no("dict", arguments))
    try:
        check_values(arguments, parser)
    except InputError as error:
        raise InputError(f"arguments: {error}") from None
    for name in SETTLED:
        _require(arguments[name] is not None, f"arguments: {name}", "is None")


def _check_history(state: dict[str, Any]) -> None:
    """The fingerprint of the data, the epochs that are done, and the steps of the next."""
    _require(isinstance(state["data"], str), "data", _is_no("text", state["data"]))
    rows, losses = state["rows"], state["losses"]
    _require(isinstance(rows, list), "rows", _is_no("list", rows))
    if state["start"] is not None:
        _check_row(state["start"], "start", 0, AT_THE_START)
    for number, row in enumerate(rows, 1):
        _check_row(row, f"rows: epoch {number}", number, IN_EVERY_ROW)
    _require(isinstance(losses, list), "losses", _is_no("list", losses))
    wrong = next((loss for loss in losses if not _is_usual(loss)), 0.0)
    _require(_is_usual(wrong), "losses", f"hold {_short(wrong)}, which is no loss")
    since = state["best_since"]
    _require(_is_index(since, 0, len(rows)), "best_since", _is_no("number of epochs", since))


def _check_row(row: object, field: str, epoch: int, needed: tuple[str, ...]) -> None:
    """The losses and scores of an epoch, or, for epoch 0, those before training."""
    _require(isinstance(row, dict), field, _is_no("dict", row))
    missing = [name for name in needed if name not in row]
    _require(not missing, field, f"has no {', '.join(missing)}")
    for name, value in row.items():
        named = isinstance(name, str) and name.isprintable()
        _require(named, field, f"has a column {_short(name)}")
        fits = _is_index(value, epoch, epoch) if name == "epoch" else _is_usual(value)
        _require(fits, f"{field}: {name:.60}", _is_no("number that it can be", value))
    recall = row["mean_recall"]
    _require(0 <= recall <= 100, f"{field}: mean_recall", _is_no("percentage", recall))


def _model(weights: object, content: object, arguments: dict[str, Any]) -> CLIP:
    """The model with these weights, as `content` describes it, learning what it does in the run."""
    _require(_holds_tensors(weights), "model", _is_no("dict of tensors by name", weights))
    try:
        factors, plain = ({n: t for n, t in weights.items() if (".lora." in n) == is_factor}
                          for is_factor in (True, False))  # fmt: skip
        model = build_model(plain, from_open_clip(content))
        choose_what_learns(
            model, *(arguments[name] for name in ("lock_image", "lock_text", "lora"))
        )
        check_keys(factors, {n: t for n, t in model.state_dict().items() if ".lora." in n})
        check_finite(factors)
        model.load_state_dict(factors, strict=False)
    except InputError as error:
        raise InputError(f"model: {error}") from None
    return model


def _check_average(average: object, model: CLIP) -> None:
    if average is None:
        return
    _require(_holds_tensors(average), "average", _is_no("dict of tensors by name", average))
    expected = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    expected["n_averaged"] = torch.tensor(0)
    for name in average.keys() ^ expected.keys():
        _require(False, f"average: {one_line(name)}", "is missing or unknown")
    for name, tensor in expected.items():
        _check_tensor(average[name], tensor, f"average: {name}")


def _check_optimizer(optimizer: object, model: CLIP, arguments: dict[str, Any]) -> None:
    """Its groups are those that the model is trained in, and its moments fit their parameters."""
    is_dict = isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)
    _require(is_dict, "optimizer", "has no state")
    groups = [
        group["params"] for group in parameter_groups(model, 0.0, 0.0, arguments["layer_decay"])
    ]
    parameters = [parameter for group in groups for parameter in group]
    saved = optimizer.get("param_groups")
    is_list = isinstance(saved, list) and all(isinstance(group, dict) for group in saved)
    _require(is_list, "optimizer: param_groups", _is_no("list of groups", saved))
    numbers = iter(range(len(parameters)))
    own = [[next(numbers) for _ in group] for group in groups]
    found = [group.get("params") for group in saved]
    fits = all(isinstance(part, list) and all(type(n) is int for n in part) for part in found)
    _require(fits and found == own, "optimizer: param_groups", "are not those of this model")
    names = MOMENTS[arguments["optimizer_type"]]
    for number, moments in optimizer["state"].items():
        field = f"optimizer: state {_short(number)}"
        _require(_is_index(number, 0, len(parameters) - 1), field, "belongs to no parameter")
        fits = isinstance(moments, dict) and moments.keys() == names
        _require(fits, field, f"does not hold {', '.join(sorted(names))}")
        for name, tensor in moments.items():
            if tensor is None and name == "momentum_buffer":  # before SGD's first step
                continue
            expected = torch.tensor(0.0) if name == "step" else parameters[number]
            _check_tensor(tensor, expected, f"{field}: {name}")
            if name in ("step", "exp_avg_sq"):
                _require(bool((tensor >= 0).all()), f"{field}: {name}", "is negative")


def _check_scaler(scaler: object) -> None:
    _require(isinstance(scaler, dict), "scaler", _is_no("dict", scaler))
    if not scaler:
        return
    _require(scaler.keys() == SCALER.keys(), "scaler", f"does not hold {', '.join(SCALER)}")
    for name, (kind, above, below) in SCALER.items():
        fits = type(scaler[name]) is kind and above < scaler[name] < below
        _require(fits, f"scaler: {name}", _is_no("value that it can have", scaler[name]))


def _check_tensor(tensor: object, expected: Tensor, field: str) -> None:
    """`tensor` has the shape and type of `expected`, and is finite."""
    _require(isinstance(tensor, Tensor), field, _is_no("tensor", tensor))
    found, own = [(t.dtype, list(t.shape)) for t in (tensor, expected)]
    _require(found == own, field, f"is {found[0]} {found[1]}, not {own[0]} {own[1]}")
    finite = tensor.sum().isfinite() or tensor.isfinite().all()
    _require(bool(finite), field, "holds NaN or infinity")


def _holds_tensors(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _is_index(value: object, first: int, last: int) -> bool:
    return type(value) is int and first <= value <= last


def _is_usual(value: object) -> bool:
    return type(value) is float and abs(value) < LARGEST


def _is_no(wanted: str, value: object) -> str:
    return f"is {_short(value)}, no {wanted}"


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return one_line(SHORT.repr(value))


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise InputError(f"{field} {problem}")
