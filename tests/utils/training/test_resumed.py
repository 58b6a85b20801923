"""A checkpoint goes on with the same numbers; one of other fields, keys or shapes is refused."""

import copy
import math
import re

import pytest
import torch
from definitions import equal_scores
from tiny import tiny_clip

from models.errors import InputError
from models.lora import add_lora
from train import build_parser
from utils.machine.precision import Precision
from utils.runs import checkpoint
from utils.runs.checkpoint import save_checkpoint, write_csv
from utils.training.optimizer import parameter_groups
from utils.training.resumed import read_resumed
from utils.training.state import State

SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
          "_growth_tracker": 3}  # fmt: skip
NAMES = set(vars(build_parser().parse_args([])))
GONE = "gone"  # stands for a field that is taken out


def new_state(model, ema=0.9):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.param_groups.clear()
    for group in parameter_groups(model, 0.9, 0.1, 0.7):
        optimizer.add_param_group(group)
    return State(model, optimizer, Precision(torch.device("cpu"), False), ema)


def train_a_step(state):
    images, tokens = torch.randn(2, 3, 8, 8), torch.tensor([[1, 2, 6, 0, 0], [3, 6, 0, 0, 0]])
    loss = state.model(images, tokens)[0].diag().sum().neg()
    loss.backward()
    state.update(loss.detach())


@pytest.fixture(scope="module")
def valid():
    """What a run of two epochs and a step has saved."""
    torch.manual_seed(0)
    state = new_state(tiny_clip())
    for _ in "ab":
        train_a_step(state)
        state.finish_epoch(
            {"train_loss": 1.0, "lr": 1e-3, "images_per_second": 9.0, "data_wait_percent": 0.0},
            equal_scores(50.0),
            2.0,
            {"retention_宠物, 2$": 50.0},
        )
    train_a_step(state)
    arguments = vars(build_parser().parse_args([])) | {
        "lr": 1e-3, "layer_decay": 0.7, "warmup_epochs": 1.0, "ema": 0.9,
        "log_dir": "logs", "dataset_path": "data", "wise_ft": [0.0, 1.0],
    }  # fmt: skip
    content = {"arguments": arguments, "data": "0af", **state.state_dict()}
    return content | {"scaler": SCALER}


def changed(content, path, value):
    """`content` with another value at `path`, and no copies of what stays."""
    if not path:
        return value
    key, *rest = path
    new = copy.copy(content)
    if value is GONE and not rest:
        del new[key]
    else:
        new[key] = changed(content[key] if rest else None, rest, value)
    return new


def taken(file, content):
    """Whether the checkpoint is taken; then it is trained on and saved. If not, one short line
    names the file."""
    fields = {key: value for key, value in content.items() if key != "format"}
    save_checkpoint(file, **fields)
    try:
        found = read_resumed(str(file), NAMES)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 700
        return message.removeprefix(f"{file}: ")
    state = new_state(found["model"], found["arguments"]["ema"])
    state.restore(found)
    train_a_step(state)
    assert all(p.isfinite().all() for p in state.model.parameters())
    assert not state.epochs or state.best_epoch <= len(state.epochs)
    save_checkpoint(file, arguments=found["arguments"], **state.state_dict())
    if state.epochs:
        write_csv(file.with_suffix(".csv"), [*state.epochs, {"epoch": 9, "mean_recall": 1.0}])
    return ""


def test_what_a_run_saves_is_taken_and_goes_on_with_the_same_numbers(valid, tmp_path):
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, **valid)
    found = read_resumed(str(file), NAMES)
    state = new_state(found["model"])
    state.restore(found)
    again = state.state_dict()
    for part in ("model", "average"):
        assert all(torch.equal(again[part][key], valid[part][key]) for key in valid[part])
    for number, moments in valid["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(again["optimizer"]["state"][number][name], tensor)
    assert again["rows"] == valid["rows"] and again["losses"] == valid["losses"]
    assert taken(file, valid) == ""


@pytest.mark.parametrize("other", [-1, 1])
def test_a_checkpoint_of_another_version_is_refused(valid, tmp_path, monkeypatch, other):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + other)
        save_checkpoint(file := tmp_path / "checkpoint.pth", **valid)
    with pytest.raises(InputError, match=r"format \d+, where this program reads \d+; continue it"):
        read_resumed(str(file), NAMES)


def test_factors_are_in_the_checkpoint_and_go_on_with_the_same_numbers(valid, tmp_path):
    arguments = valid["arguments"] | {"lora": 2, "ema": None}
    model = tiny_clip()
    add_lora(model, 2)
    state = new_state(model, ema=None)
    train_a_step(state)
    content = valid | state.state_dict() | {"arguments": arguments, "rows": [], "losses": [1.0]}
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, **content)
    found = read_resumed(str(file), NAMES)["model"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in content["model"].items())
    assert any(name.endswith("lora.b") and tensor.any() for name, tensor in found.items())
    assert taken(file, content) == ""
    name = "transformer.resblocks.0.attn.lora.a"
    for path, value in [
        (("model", name), GONE), (("model", name), torch.zeros(3, 1, 64)),
        (("arguments", "lora"), 3), (("arguments", "lora"), None),
    ]:  # fmt: skip
        assert taken(file, changed(content, path, value)), path


WRONG = [
    (("model", "text_projection"), GONE, "missing: text_projection"),
    (("model", "text_projection"), torch.zeros(3), r"text_projection \[3\]"),
    (("model", "more"), torch.zeros(3), "unknown: more"),
    (("model", "logit_scale"), torch.tensor(math.nan), "logit_scale"),
    (("arguments", "lock_image"), 9, "--lock_image 9"),
    (("arguments", "lr"), GONE, "arguments .* lr"),
    (("arguments", "unknown"), 1, "arguments .* unknown"),
]


@pytest.mark.parametrize("path, value, words", WRONG, ids=str)
def test_other_fields_keys_and_shapes_are_refused_by_name(valid, tmp_path, path, value, words):
    assert re.search(words, taken(tmp_path / "checkpoint.pth", changed(valid, path, value)))


def test_a_damaged_archive_is_no_checkpoint(valid, tmp_path):
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, **valid)
    damaged = file.read_bytes()
    file.write_bytes(damaged.replace(b"PK\1\2", b"PK\1\3", 1))
    assert read_resumed(str(file), NAMES) is None  # no archive; refused as weights, too
