"""Every kind of weights file loads to the same model; every other file is refused unharmed."""

import pickle
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from peers import disturb, open_clip_model
from published import save_published
from safetensors.torch import save_file

from models import load, tokenize
from models.clip_utils import create_model
from models.errors import InputError
from utils.checkpoint import save_weights

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
        "before torch 1.6": weights,
        "ours, checkpoint": {"format": 1, "model": weights, "optimizer": {}, "rows": []},
        "open_clip": {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{k}": v for k, v in weights.items()},
            "optimizer": {},
        },
    }[kind]
    torch.save(content, path, _use_new_zipfile_serialization=kind != "before torch 1.6")
    return path


KINDS = ["published", "float32", "float16", "before torch 1.6", "safetensors", "safetensors half",
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


@pytest.mark.parametrize(
    "name, depth",
    [("ViT-B/16", {"vision_layers": 1}), ("RN50", {"vision_layers": (1, 1, 1, 1)})],
)
def test_a_published_archive_gives_the_features_that_open_clip_reads_from_it(tmp_path, name, depth):
    weights = open_clip_model(name, **depth, text_layers=1).state_dict()
    path = save_published(weights, tmp_path / "archive.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
    ours, _ = load(path, "cpu")
    images, tokens = torch.randn(2, 3, 224, 224), tokenize(["a dog", "two cats on a mat"])
    with torch.no_grad():
        for mine, other in [
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens)),
        ]:
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


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


def test_code_in_a_file_is_not_run(archive, tmp_path):
    sprung = tmp_path / "sprung"
    plain, legacy = tmp_path / "plain.pt", tmp_path / "legacy.pt"
    torch.save({"a": Trap(sprung)}, plain)
    torch.save({"a": Trap(sprung)}, legacy, _use_new_zipfile_serialization=False)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Trap(sprung)))
    script = with_pickle(archive, tmp_path / "script.pt", pickle.dumps(Trap(sprung)))
    for path in (plain, legacy, bare, script):
        with pytest.raises(InputError, match=path.name):
            load(path, "cpu")
        assert not sprung.exists(), path.name
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works


def test_a_record_that_lies_about_its_length_is_refused(archive, tmp_path):
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "short.pt", "w") as copy:
        for name in source.namelist():
            data = source.read(name)
            copy.writestr(name, data[:-2] if name.endswith("/data/0") else data)
    with pytest.raises(InputError, match="shorter than it says"):
        load(tmp_path / "short.pt", "cpu")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "Git LFS"),
        (b"ftypisom and so on", "another file of 18 bytes, not weights"),
        (b"PK\x03\x04 and nothing else", "truncated or damaged"),
        (b"\x80\x02 and nothing else", "download it anew|plain state dict"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "truncated or damaged"),
    ],
)
def test_a_file_that_holds_no_weights_says_what_it_is(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load(path, "cpu")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(demo, tmp_path, kind, share):
    path = save_as(kind, demo, tmp_path / "weights.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=path.name):
        load(path, "cpu")


def test_a_safetensors_header_that_lies_is_refused(demo, tmp_path):
    path = save_as("safetensors", demo, tmp_path / "weights")
    content = bytearray(path.read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors"):
        load(path, "cpu")


def test_what_is_no_clip_says_so(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path, "cpu")
    with pytest.raises(InputError, match=r"neither a file.*ViT-B/32"):
        load("ViT-B-32", "cpu")
    other = tmp_path / "other.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(InputError, match=r"other\.pt.*ln_final\.weight"):
        load(other, "cpu")
    torch.save([1, 2], other)
    with pytest.raises(InputError, match=r"other\.pt: holds list"):
        load(other, "cpu")
