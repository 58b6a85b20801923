"""Checkpoints that were damaged or made up: refused by file and field, or trained on."""

import contextlib
import copy
import io
import math
import pickle
import time
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_clip

from models.errors import InputError
from models.lora import add_lora
from train import build_parser
from utils.machine.precision import Precision
from utils.retrieval.tables import TITLES
from utils.runs import checkpoint
from utils.runs.checkpoint import save_checkpoint, write_csv
from utils.training.optimizer import parameter_groups
from utils.training.resumed import read_resumed
from utils.training.state import State

SCORES = ["R@1", "R@5", "R@10", "mAP@1", "mAP@5", "mAP@10", "median_rank", "mean_rank"]
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
          "_growth_tracker": 3}  # fmt: skip
GONE = object()  # stands for a field that is taken out


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
    metrics = {way: dict.fromkeys(SCORES, 50.0) for way in TITLES}
    for _ in "ab":
        train_a_step(state)
        state.finish_epoch(
            {"train_loss": 1.0, "lr": 1e-3, "images_per_second": 9.0, "data_wait_percent": 0.0},
            metrics,
            2.0,
            {"retention_宠物, 2$": 50.0},
        )
    train_a_step(state)
    arguments = vars(build_parser().parse_args([])) | {
        "lr": 1e-3, "layer_decay": 0.7, "warmup_epochs": 1.0, "ema": 0.9,
        "log_dir": "logs", "dataset_path": "data", "wise_ft": [0.0, 1.0],
    }  # fmt: skip
    content = {"arguments": arguments, "data": "0af", "best_since": 0, **state.state_dict()}
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
        found = read_resumed(str(file), build_parser())
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 700
        return message.removeprefix(f"{file}: ")
    state = new_state(found["model"], found["arguments"]["ema"])
    state.restore(found)
    train_a_step(state)
    assert all(p.isfinite().all() for p in state.model.parameters())
    assert state.epochs_since_best >= 0
    save_checkpoint(file, arguments=found["arguments"], **state.state_dict())
    if state.epochs:
        write_csv(file.with_suffix(".csv"), [*state.epochs, {"epoch": 9, "mean_recall": 1.0}])
    return ""


def test_what_a_run_saves_is_taken_and_goes_on_with_the_same_numbers(valid, tmp_path):
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, **valid)
    found = read_resumed(str(file), build_parser())
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
        read_resumed(str(file), build_parser())


def test_factors_are_in_the_checkpoint_and_go_on_with_the_same_numbers(valid, tmp_path):
    arguments = valid["arguments"] | {"lora": 2, "ema": None}
    model = tiny_clip()
    add_lora(model, 2)
    state = new_state(model, ema=None)
    train_a_step(state)
    content = valid | state.state_dict() | {"arguments": arguments, "rows": [], "losses": [1.0]}
    file = tmp_path / "checkpoint.pth"
    save_checkpoint(file, **content)
    found = read_resumed(str(file), build_parser())["model"].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in content["model"].items())
    assert any(name.endswith("lora.b") and tensor.any() for name, tensor in found.items())
    assert taken(file, content) == ""
    name = "transformer.resblocks.0.attn.lora.a"
    for path, value in [
        (("model", name), GONE), (("model", name), torch.zeros(3, 1, 64)),
        (("model", name), torch.full((3, 2, 64), math.nan)), (("arguments", "lora"), 3),
        (("arguments", "lora"), None),
    ]:  # fmt: skip
        assert taken(file, changed(content, path, value)).startswith("model"), path


STATE = ("optimizer", "state", 0)
GROUPS = ("optimizer", "param_groups")
WRONG = [
    *(((field,), GONE) for field in ("arguments", "data", "rows", "best_since", "losses", "model",
                                     "average", "optimizer", "scaler")),
    *(((field,), value) for field in ("arguments", "data", "rows", "losses", "model", "optimizer",
                                      "scaler", "best_since")
      for value in (None, 1.5, torch.zeros(2))),
    (("rows",), {}), (("rows",), "text"), (("rows",), [1, 2]), (("rows",), [[]]),
    (("rows", 0), {}), (("rows", 0, "mean_recall"), GONE), (("rows", 0, "train_loss"), "1"),
    (("rows", 1, "mean_recall"), math.nan), (("rows", 1, "val_loss"), math.inf),
    (("rows", 1, "mean_recall"), 101.0), (("rows", 1, "mean_recall"), -1.0),
    (("rows", 1, "epoch"), 7), (("rows", 1, "epoch"), True), (("rows", 0, "\ud800"), 1.0),
    (("rows", 0, 3), 1.0), (("rows", 0, "lr"), 2**999), (("best_since",), 3),
    (("best_since",), -1), (("losses",), "text"), (("losses",), [1]), (("losses",), [math.nan]),
    (("losses",), [None]), (("losses",), {}), (("data",), ["0af"]),
    (("model",), []), (("model",), {}), (("model", "text_projection"), GONE),
    (("model", "text_projection"), torch.zeros(3)), (("model", "more"), torch.zeros(3)),
    (("model", "text_projection"), "text"), (("model", 3), torch.zeros(3)),
    (("model", "logit_scale"), torch.tensor(math.nan)),
    (("average",), []), (("average",), {}), (("average", "n_averaged"), GONE),
    (("average", "n_averaged"), torch.tensor(1.0)), (("average", "more"), torch.zeros(1)),
    (("average", "module.logit_scale"), torch.tensor(math.inf)),
    (("average", "module.text_projection"), torch.zeros(2, 2)),
    (("optimizer", "state"), GONE), (("optimizer", "state"), []), (GROUPS, GONE), (GROUPS, []),
    (GROUPS, [1]), ((*GROUPS, 0), {}), ((*GROUPS, 0, "params"), [0]),
    ((*GROUPS, 0, "params"), "01"),
    ((*GROUPS, 0, "params"), [torch.zeros(2)]), ((*GROUPS, 0, "params"), torch.zeros(2)),
    (STATE, []), (STATE, {}), ((*STATE[:2], 99), {}),
    ((*STATE[:2], "0"), {}), ((*STATE, "exp_avg"), GONE), ((*STATE, "exp_avg"), None),
    ((*STATE, "exp_avg"), torch.zeros(3)), ((*STATE, "exp_avg"), torch.zeros(5, 64).long()),
    ((*STATE, "more"), torch.zeros(3)), ((*STATE, "step"), 3),
    ((*STATE, "step"), torch.tensor(-1.0)), ((*STATE, "step"), torch.ones(2)),
    ((*STATE, "exp_avg_sq"), torch.full((5, 64), -1.0)),
    ((*STATE, "exp_avg_sq"), torch.full((5, 64), math.nan)),
    (("scaler",), []), (("scaler", "scale"), GONE), (("scaler", "scale"), -1.0),
    (("scaler", "scale"), math.nan), (("scaler", "growth_interval"), "2"),
    (("scaler", "backoff_factor"), 2.0), (("scaler", "_growth_tracker"), None),
    *((("arguments", name), value) for name, value in [
        ("lr", -1.0), ("lr", GONE), ("lr", None), ("lr", True), ("lr", "1e-3"), ("ema", 2.0),
        ("seed", -1), ("seed", 2**32), ("batch_size", "64"), ("batch_size", 1), ("epochs", None),
        ("epochs", 2.0), ("language", "en"), ("language", ["xx"]), ("language", []),
        ("language", [["en"]]), ("optimizer_type", "rmsprop"), ("optimizer_type", []),
        ("wise_ft", [2.0]), ("wise_ft", 0.5), ("demo", 1), ("use_amp", None), ("cache", 3),
        ("dataset_path", None), ("dataset_path", "a\0b"), ("dataset_path", "a" * 10_000),
        ("layer_decay", 1.0), ("lock_image", 0), ("lock_image", 9), ("device", []),
        ("momentum", math.nan), ("unknown", 1), (7, 1), ("a\nb", 1), ("lr", "1\n2"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(
    "path, value", WRONG, ids=lambda part: "gone" if part is GONE else f"{part!r:.40}"
)
def test_what_no_run_saves_is_refused_by_its_field(valid, tmp_path, path, value):
    message = taken(tmp_path / "checkpoint.pth", changed(valid, path, value))
    # These two decide which groups the moments belong to; and the model has no nine blocks.
    named = "optimizer" if path[-1] in ("lock_image", "layer_decay") else path[0]
    assert message.startswith("model" if "--lock_image 9" in message else named), message


def paths(content, depth=4):
    """The places in a checkpoint, of which those in large dicts stand for all."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (key,)
        if depth and isinstance(value, dict | list):
            yield from ((key, *rest) for rest in paths(value, depth - 1))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
anything = st.recursive(
    scalars | st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=3)),
    lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chance=st.data())
def test_any_change_of_a_checkpoint_is_refused_or_trained_on(valid, tmp_path, chance):
    content = valid
    for _ in range(chance.draw(st.integers(1, 2))):
        # The first key is drawn alone, so that small fields come as often as large ones.
        field = chance.draw(st.sampled_from(sorted(valid)))
        below = sorted((p for p in paths(valid) if p[0] == field), key=repr)
        path = chance.draw(st.sampled_from(below))
        value = chance.draw(st.just(GONE) | anything)
        # The first change may have taken the place of the second away, or put a tensor there.
        with contextlib.suppress(LookupError, TypeError, AttributeError, RuntimeError, ValueError):
            content = changed(content, path, value)
    taken(tmp_path / "checkpoint.pth", content)


def archive_of(pickled):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return file.getvalue()


@pytest.mark.slow
def test_a_nested_checkpoint_is_refused_at_once(valid, tmp_path):
    """A list in a list and so on, and one that holds the same list twice, sixty times over: to
    print, to compare or to copy the latter takes 2^60 steps."""
    deep, wide = [], []
    for _ in range(60):
        wide = [wide, wide]
    file = tmp_path / "checkpoint.pth"
    for _ in range(200):
        deep = [deep]
    for path in (("rows",), ("losses",), ("scaler",), ("arguments", "lr"), ("data",)):
        for value in (wide, deep):
            started = time.process_time()
            assert taken(file, changed(valid, path, value)).startswith(path[0])
            assert time.process_time() - started < 5
    head = pickle.dumps({"format": 6, "arguments": {}}, 2)[:-1]  # without the end
    file.write_bytes(archive_of(head + b"X\4\0\0\0rows" + b"]" * 300_000 + b"a" * 299_999 + b"s."))
    with pytest.raises(InputError, match=r"checkpoint\.pth: "):
        read_resumed(str(file), build_parser())


def test_a_checkpoint_that_claims_more_than_it_holds_gets_no_memory(valid, tmp_path):
    """Four numbers, told to be a trillion."""
    file = tmp_path / "checkpoint.pth"
    for size in ((10**12,), (10**6, 10**6)):
        huge = torch.zeros(1).expand(size)
        message = taken(file, changed(valid, ("average", "module.logit_scale"), huge))
        assert "tensors claim more than its" in message
    save_checkpoint(file, **valid)
    damaged = file.read_bytes()
    file.write_bytes(damaged.replace(b"PK\1\2", b"PK\1\3", 1))
    assert read_resumed(str(file), build_parser()) is None  # no archive; refused as weights, too
