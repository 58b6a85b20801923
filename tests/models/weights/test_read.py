"""Every kind of weights file loads to the same model; every other file is refused unharmed."""

import copy
import json
import pickle
import re
import tempfile
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import suppress
from datetime import datetime, timedelta
from enum import Enum
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import disturb
from published import save_published
from safetensors.torch import save_file

from models import load as load_model
from models.clip_utils import create_model
from models.errors import InputError
from models.weights.read import NO_WEIGHTS, read_file
from utils.runs.checkpoint import save_weights

load = partial(load_model, activation="quick_gelu")  # which a state dict does not tell
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def demo():
    """A small model whose weights are whole float16 numbers, so that no file format rounds them."""
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    disturb(model)
    return model.half().float().eval()


@pytest.fixture(scope="module")
def archive(demo, tmp_path_factory):
    return save_published(demo.state_dict(), tmp_path_factory.mktemp("archive") / "demo.pt")


def save_as(kind: str, model, path: Path) -> Path:
    weights = model.state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if kind == "published":
        return save_published(weights, path.with_suffix(".pt"))
    if kind.startswith("safetensors"):
        save_file(half if kind.endswith("half") else weights, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if kind == "ours, best weights":
        save_weights(model, path)
        return path
    content = {
        "float32": weights,
        "float16": half,
        "ours, checkpoint": {"format": 1, "model": weights, "optimizer": {}, "rows": []},
        "open_clip": {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{k}": v for k, v in weights.items()},
            "optimizer": {},
        },
    }[kind]
    torch.save(content, path)
    return path


KINDS = ["published", "float32", "float16", "safetensors", "safetensors half",
         "ours, best weights", "ours, checkpoint", "open_clip"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_loads_to_the_same_float32_weights(demo, tmp_path, kind):
    path = save_as(kind, demo, tmp_path / "weights.pth")
    model, preprocess = load(path, "cpu")
    loaded, expected = model.state_dict(), demo.state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, expected[key]) and tensor.dtype == expected[key].dtype, key
    assert not model.training and preprocess.side == 64


def test_a_model_loaded_from_an_archive_trains(archive):
    model, _ = load(archive, "cpu")
    model.encode_image(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.visual.conv1.weight.grad.isfinite().all()
    before = archive.read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert archive.read_bytes() == before


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def with_pickle(archive: Path, target: Path, content: bytes) -> Path:
    """A copy of a TorchScript archive with another data.pkl."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            copy.writestr(name, content if name.endswith("/data.pkl") else source.read(name))
    return target


def test_code_in_a_file_is_not_run(demo, archive, tmp_path):
    sprung = tmp_path / "sprung"
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Trap(sprung)))
    script = with_pickle(archive, tmp_path / "script.pt", pickle.dumps(Trap(sprung)))
    for path in (bare, script, saved({"a": Trap(sprung)}, tmp_path / "alone.pt")):
        with pytest.raises(InputError, match=path.name):
            load(path, "cpu")
        assert not sprung.exists(), path.name
    for protocol in range(2, 6):
        content, path = {"a": Trap(sprung), "model": demo.state_dict()}, tmp_path / "beside.pt"
        torch.save(content, path, pickle_protocol=protocol)
        load(path, "cpu")
        assert not sprung.exists(), protocol
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize("as_slots", [False, True])
@pytest.mark.parametrize(
    "name", ["__torch__ M", "collections OrderedDict", "torch._utils _rebuild_tensor_v2",
             "torch._utils _rebuild_parameter", "torch FloatStorage"]
)  # fmt: skip
def test_a_file_cannot_change_how_the_next_is_read(demo, archive, tmp_path, name, as_slots):
    """The opcode BUILD sets attributes, also of a class or function, where nothing hinders it."""
    target = b"c" + name.encode().replace(b" ", b"\n") + b"\n"
    state = b"}X\14\0\0\0__setstate__" + target + b"s"
    content = b"\x80\x02" + target + (b"N" + state + b"\x86" if as_slots else state) + b"b."
    with suppress(InputError):
        read_file(with_pickle(archive, tmp_path / "changes.pt", content))
    assert read_file(archive)[0].keys() == demo.state_dict().keys()


def test_a_record_that_lies_about_its_length_is_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "short.pt", "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            copy.writestr(name, data[:-2] if name.endswith("/data/0") else data)
    with pytest.raises(InputError, match=r"damaged .*out of bounds"):
        load(tmp_path / "short.pt", "cpu")


def refusal(path: Path) -> str:
    """What `load` says of a file: one line that starts with its name and is not long."""
    with pytest.raises(InputError) as caught:
        load(path, "cpu")
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    assert len(message) < len(str(path)) + 500
    return message.removeprefix(f"{path}: ")


# The end of an archive on several disks, which `zipfile` does not read.
TWO_DISKS = b"PK\6\7" + bytes(12) + b"\2\0\0\0PK\5\6" + bytes(18)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"\xef\xbb\xbf<!-- moved -->\n<html></html>", "a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            "a Git LFS pointer",
        ),
        (b"ftypisom and so on", "another file of 18 bytes, not weights"),
        (b"PK\x03\x04 and nothing else", "truncated or damaged"),
        (b"pK\x03\x04 as no archive starts" + TWO_DISKS, "another file of 67 bytes, not weights"),
        (b"\x80\x02 and nothing else", "a bare pickle"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "truncated or damaged"),
    ],
)
def test_a_file_that_holds_no_weights_says_what_it_is(tmp_path, content, message, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    said = refusal(path)
    assert said.startswith(message)
    assert re.search("download it anew|git lfs pull|save it anew", said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(demo, tmp_path, kind, share):
    path = save_as(kind, demo, tmp_path / "weights.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=path.name):
        load(path, "cpu")


def write_safetensors(path: Path, header: bytes, data: bytes = bytes(64)) -> Path:
    """By the format's specification: the header's length, the header (JSON), the numbers."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [17]},
        {"shape": [2**40, 2**40]},
        {"shape": [-16]},
        {"shape": [0, 2**62]},
        {"data_offsets": [0, 2**40]},
        {"data_offsets": [64, 0]},
        {"data_offsets": [32, 96]},
        {"dtype": "F64"},
        {"dtype": "F4"},
        {"dtype": "no such type"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    honest = write_safetensors(tmp_path / "a.safetensors", json.dumps({"a": entry}).encode())
    assert torch.equal(read_file(honest)[0]["a"], torch.zeros(16))
    header = json.dumps({"a": entry | change}).encode()
    assert "damaged" in refusal(write_safetensors(tmp_path / "b.safetensors", header))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**64 - 1])
def test_a_safetensors_length_that_lies_is_refused(demo, tmp_path, length):
    path = save_as("safetensors", demo, tmp_path / "weights")
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("length", [0x4B50, 0x0280])
def test_a_safetensors_length_that_looks_like_another_format(tmp_path, length):
    """Its first bytes are "PK", as of a zip, or 80 02, as of a pickle."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    path = write_safetensors(tmp_path / "a.safetensors", header.ljust(length))
    assert torch.equal(read_file(path)[0]["a"], torch.zeros(16))


@st.composite
def tensors(draw):
    """Tensors of every type a file may hold, some of them views with strides of their own."""
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
             torch.int8, torch.int16, torch.int32, torch.int64]  # fmt: skip
    tensor = torch.randn(draw(st.lists(st.integers(0, 5), max_size=4)))
    tensor = tensor.mul(100).to(draw(st.sampled_from(kinds)))
    if draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, 2)) :: draw(st.integers(1, 2))]
    return tensor if draw(st.booleans()) else torch.nn.Parameter(tensor, requires_grad=False)


@settings(max_examples=150)
@given(st.dictionaries(st.text(min_size=1, max_size=5), tensors(), max_size=4))
def test_tensors_are_those_that_torch_load_reads(weights):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(weights, path)
        expected, ours = torch.load(path, weights_only=True), read_file(path)[0]
    assert list(ours) == [key for key in expected if key not in NO_WEIGHTS]
    for key, tensor in ours.items():
        like = expected[key].float() if expected[key].is_floating_point() else expected[key]
        assert torch.equal(tensor, like) and tensor.dtype == like.dtype


class Paint:
    class Colour(Enum):
        RED = 1


def beside_weights() -> dict:
    """What training programs save: their settings, their records, and the state of all."""
    itself: list = []
    itself.append((itself,))
    tagged = torch.nn.Parameter(torch.ones(1))
    tagged.tag = "no decay"
    return {
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"betas": (0.9, 1)}]},
        "random": (torch.get_rng_state(), 2**70, [None, True], {1}, b"bytes", "文"),
        "types": [torch.float16, torch.Size([1]), torch.device("cuda:0"), OrderedDict(a=1)],
        "args": Namespace(lr=1e-5, output=Path("logs/run"), windows=PureWindowsPath("C:/run")),
        "numpy": [np.float64(0.5), np.int64(3), np.arange(6.0).reshape(2, 3), np.dtype("<f4"),
                  np.array([{}, "a"], dtype=object), np.random.RandomState(0).get_state()],
        "times": [datetime.now(), timedelta(hours=1)],
        "collections": [defaultdict(list, {"a": [1]}), deque([1, 2], maxlen=3), Counter("aab")],
        "others": [Paint.Colour.RED, frozenset({1}), {(1, 2)}, bytearray(b"x"), 1j, partial(max)],
        "keys": {(1, 2): 3, Paint.Colour.RED: 4, b"x": 5, True: 6},
        "itself": itself,
        "tagged": tagged,
    }  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_a_checkpoint_holds_beside_its_weights_is_passed_over(demo, tmp_path, protocol):
    path, content = tmp_path / "checkpoint.pth", {"model": demo.state_dict(), **beside_weights()}
    torch.save(content, path, pickle_protocol=protocol)
    assert_same(path, demo)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: {"epoch": 3, "net": model},
        lambda model: torch.nn.ModuleDict({"clip": model, "head": torch.nn.Linear(2, 2)}),
        lambda model: model.state_dict() | {"logit_scale": model.logit_scale.detach().view(1)},
        lambda model: model.state_dict() | {"attn_mask": torch.zeros(77, 77)},
    ],
    ids=["module", "module in a dict", "module in a module", "logit_scale [1]", "attn_mask"],
)
def test_the_same_weights_in_another_form(demo, tmp_path, change):
    assert_same(saved(change(demo), tmp_path / "weights.pth"), demo)


def assert_same(path, model):
    loaded = load(path, "cpu")[0].state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


# --- Weights of another model, or of a broken one -------------------------------------------------


def without(weights: dict, *prefixes: str) -> dict:
    return {key: tensor for key, tensor in weights.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: without(w, "visual."), "not the weights of a whole CLIP: .*visual.* is missing"),
        (
            lambda w: {k: t for k, t in w.items() if k.startswith("visual.")},
            "not the weights of a whole CLIP: .* is missing",
        ),
        (
            lambda w: dict(list(w.items())[: len(w) // 2]),
            "not the weights of a whole CLIP: .* is missing",
        ),
        (  # as `model.visual.state_dict()` saves it
            lambda w: {k[7:]: t for k, t in w.items() if k.startswith("visual.")},
            "not the weights of a whole CLIP: .* is missing",
        ),
        (
            lambda w: {f"text.{k}": t for k, t in without(w, "visual.").items()},
            "not the weights of a whole CLIP: .*visual.* is missing",
        ),
        (
            lambda w: {"base_model.model.text_model.x.lora_A.weight": torch.zeros(2, 2)},
            "not the weights of a whole CLIP: .* is missing",
        ),
        (
            lambda w: without(w, "visual.transformer.resblocks.1.", "transformer.resblocks.1."),
            r"missing: visual\S+resblocks\.1\..*; unknown: visual\S+resblocks\.2\.",
        ),
        (lambda w: without(w, "visual.transformer."), r"visual\S+resblocks\.0\S+ is missing"),
        (
            lambda w: {k: t.int() for k, t in w.items()},
            "of another shape or type: .* of integers instead",
        ),
        (lambda w: {f"b_{k}": t for k, t in w.items()}, r"its keys: b_\w+"),
        (lambda w: {}, "its keys: none"),
        (
            lambda w: w | {"visual.positional_embedding": torch.zeros(16, 192)},
            r"positional_embedding \[16, 192\] of floats instead of \[10, 192\] of floats",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_weights_of_another_model_say_what_they_are(demo, tmp_path, change, message):
    path = saved(change(demo.state_dict()), tmp_path / "other.pt")
    said = refusal(path)
    assert re.search(message, said)
    assert "give " in said or "save them anew" in said


def test_names_made_to_deceive_a_terminal_are_shown_as_they_are(demo, tmp_path):
    odd = {"\x1b[2Jx\nfake: all is well": torch.zeros(1)}
    said = refusal(saved(demo.state_dict() | odd, tmp_path / "odd.pt"))
    assert r"unknown: '\x1b[2Jx\nfake" in said
    refusal(saved({"\n" * 9000: 3}, tmp_path / "odd.pt"))


@pytest.mark.parametrize("kind", ["published", "safetensors", "ours, best weights", "open_clip"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_weights_that_are_not_finite_are_refused_by_name(demo, tmp_path, kind, number):
    """1e30 is infinite as float16, and a float32 like any other."""
    model = copy.deepcopy(demo)
    key = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    model.get_parameter(key).data[3, 4] = number
    path = save_as(kind, model, tmp_path / "weights.pth")
    if number == 1e30 and kind in ("safetensors", "open_clip"):
        loaded = load(path, "cpu")[0].get_parameter(key)
        assert torch.equal(loaded, model.get_parameter(key))
        return
    said = refusal(path)
    assert said.startswith("NaN or infinity in the weights") and key in said
    assert "more" not in said


def test_large_finite_weights_are_not_taken_for_infinite(demo, tmp_path):
    """Their sum overflows."""
    weights = demo.state_dict() | {"visual.proj": torch.full((192, 256), 3e38)}
    load(saved(weights, tmp_path / "weights.pt"), "cpu")


def test_what_is_no_clip_says_so(tmp_path):
    assert "a folder without weights" in refusal(tmp_path)
    with pytest.raises(InputError, match=r"neither a file.*ViT-B/32"):
        load("ViT-B-32", "cpu")
    other = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(InputError, match=r"other\.pt.*ln_final\.weight"):
        load(other, "cpu")
    torch.save([1, 2], other)
    with pytest.raises(InputError, match=r"other\.pt: holds list"):
        load(other, "cpu")
