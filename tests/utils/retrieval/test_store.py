"""Cached features: those of the model itself, whatever happens to the images, the weights, the
store and the programs that use it."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from models.clip_utils import create_model
from models.errors import InputError
from models.preprocess import open_image
from utils.data.image_files import find_images
from utils.machine.precision import Precision
from utils.retrieval import store
from utils.retrieval.encode import cached_caption_features, encode_texts
from utils.retrieval.search import image_features
from utils.runs.checkpoint import save_weights, write_json

HALF = 2**-11  # relative error of a number that is rounded to float16
FLOAT32, MIXED = (Precision(torch.device("cpu"), use_amp) for use_amp in (False, True))
CAPTIONS = ["a dog", "a cat", "一只狗", "word " * 99]


def demo(seed: int = 0):
    torch.manual_seed(seed)
    return create_model("ViT-demo").eval()


@pytest.fixture
def weights(tmp_path):
    """A file in a run; the tests give the model themselves."""
    file = tmp_path / "run" / "weights" / "best.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    write_json(tmp_path / "run" / "arguments.json", {})
    return file


@pytest.fixture
def folder(tmp_path):
    """Six images of noise in two folders."""
    for i in range(6):
        draw(tmp_path / "photos" / ("a" if i % 2 else "b") / f"{i}.png", i)
    return tmp_path / "photos"


def draw(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 80, 3), np.uint8)
    Image.fromarray(pixels).save(file)


class Counted:
    """A model, and how many images it has encoded."""

    def __init__(self, model):
        self.model, self.images = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_image(self, images, normalize):
        self.images += len(images)
        return self.model.encode_image(images, normalize)


def searched(model, weights, folder) -> int:
    """Check the features of all images in the folder, and return how many were encoded now."""
    counted = Counted(model)
    images, features = image_features(counted, weights, folder, find_images(folder), FLOAT32)
    assert images == find_images(folder)
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(open_image(folder / image)) for image in images])
        own = F.normalize(model.encode_image(pixels), dim=-1)
    assert features.dtype == torch.float16
    assert torch.allclose(features.float(), own, rtol=2 * HALF, atol=1e-6)
    return counted.images


def stored(place: Path) -> list[list[str]]:
    """The keys in the files of the only store below a folder, the oldest first."""
    keys = []
    for file in sorted(place.rglob(store.FILES)):
        with safe_open(file, "np") as content:
            assert content.get_tensor("features").dtype == np.float16
            keys.append(json.loads(content.get_tensor("about").tobytes())["keys"])
            assert len(content.get_tensor("features")) == len(keys[-1])
    return keys


def test_an_image_is_encoded_once_and_again_when_it_has_changed(weights, folder):
    model, kept = demo(), weights.parents[1] / "features"
    assert searched(model, weights, folder) == 6
    assert searched(model, weights, folder) == 0
    draw(folder / "new" / "deep" / "6.PNG", 6)
    assert searched(model, weights, folder) == 1
    draw(folder / "a" / "1.png", 7)  # changed
    os.utime(folder / "b" / "0.png", (1, 1))  # touched
    (folder / "a" / "3.png").rename(folder / "a" / "moved.png")
    assert searched(model, weights, folder) == 3
    for gone in ("a/moved.png", "b/2.png"):
        (folder / gone).unlink()
    assert searched(model, weights, folder) == 0
    (keys,) = stored(kept)  # of ten images, half are gone
    names = {key.split(" ", 3)[3] for key in keys}
    assert names == {"a/1.png", "a/5.png", "b/0.png", "b/4.png", "new/deep/6.PNG"}


def test_new_images_are_written_beside_the_others_until_there_are_many_files(
    weights, folder, monkeypatch
):
    """So that ten new ones of a million take ten features' room and time."""
    monkeypatch.setattr(store, "MOST_FILES", 3)
    model, kept = demo(), weights.parents[1] / "features"
    for number, sizes in enumerate([[6], [6, 1], [6, 1, 1], [9]]):
        if number:
            draw(folder / "a" / f"0{number}.png", 10 + number)  # among the others, in their order
        assert searched(model, weights, folder) == (1 if number else 6)
        before = [(file, file.stat().st_mtime_ns) for file in kept.rglob(store.FILES)]
        assert [len(keys) for keys in stored(kept)] == sizes
        assert searched(model, weights, folder) == 0
        assert before == [(file, file.stat().st_mtime_ns) for file in kept.rglob(store.FILES)]
    (file,) = kept.rglob(store.FILES)
    for copy in "abcd":  # as several programs may leave
        shutil.copy(file, file.with_stem(file.stem + copy))
    draw(folder / "a" / "new.png", 20)
    assert searched(model, weights, folder) == 1 and [len(keys) for keys in stored(kept)] == [10]


@pytest.mark.skipif(sys.platform == "win32", reason="its files have no time of their change")
def test_a_picture_in_the_place_of_one_with_its_size_and_time_is_encoded(weights, folder):
    """As an archive leaves it, which gives all its files one time. Noise: `searched` compares."""
    file = folder / "new.bmp"  # not compressed, so that all have one size
    for seed in (6, 7):
        draw(file, seed)
        os.utime(file, ns=(10**18, 10**18))
        assert searched(demo(), weights, folder) == (7 if seed == 6 else 1)


def test_features_are_those_of_the_weights_whatever_their_file_says(weights, folder):
    """Two models in turn, from a file of one name, size and time."""
    assert searched(demo(0), weights, folder) == 6
    assert searched(demo(1), weights, folder) == 6
    assert searched(demo(1), weights, folder) == 0


def test_each_precision_has_features_of_its_own(weights, folder):
    """bfloat16 rounds more coarsely than float16, in which features are cached."""
    model = demo()

    def in_bfloat16() -> tuple[int, torch.Tensor]:
        counted = Counted(model)
        _, features = image_features(counted, weights, folder, find_images(folder), MIXED)
        return counted.images, features.float()

    encoded, coarse = in_bfloat16()
    again, same = in_bfloat16()
    assert (encoded, again) == (6, 0) and torch.equal(coarse, same)
    assert searched(model, weights, folder) == 6  # and they are right to float16's 11 bits
    _, exact = image_features(model, weights, folder, find_images(folder), FLOAT32)
    distances = (coarse - exact).norm(dim=1)  # of vectors of length 1, after 8 bits several times
    assert distances.min() > HALF and distances.max() < 0.1
    assert in_bfloat16()[0] == searched(model, weights, folder) == 0
    own = encode_texts(model, model.tokenize(CAPTIONS, truncate=True))
    cached_caption_features(model, weights, "list", CAPTIONS, MIXED)
    kept = cached_caption_features(model, weights, "list", CAPTIONS, FLOAT32)
    assert torch.allclose(kept, own, rtol=2 * HALF, atol=1e-6)


def test_another_preprocessing_makes_other_features(weights, folder):
    searched(demo(), weights, folder)
    model = demo()
    model.config = replace(model.config, mean=(0.5, 0.5, 0.5))
    assert searched(model, weights, folder) == 6


def test_captions_are_kept_as_encode_texts_gives_them(weights, monkeypatch):
    model = demo()
    own = encode_texts(model, model.tokenize(CAPTIONS, truncate=True))
    for captions in (CAPTIONS[:2], CAPTIONS, CAPTIONS[::-1]):
        features = cached_caption_features(model, weights, "list", captions, FLOAT32)
        expected = own[[CAPTIONS.index(caption) for caption in captions]]
        assert torch.allclose(features, expected, rtol=2 * HALF, atol=1e-6)
    monkeypatch.setattr(model, "encode_text", None)  # would fail
    cached_caption_features(model, weights, "list", CAPTIONS, FLOAT32)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_tuning_one_tower_makes_its_features_anew_and_spares_the_others(weights, folder, tower):
    """Also where the logit scale has moved, which is part of neither."""
    model, encoded = demo(), []

    def captions() -> int:
        """Check the features of all captions, and return how many were encoded now."""
        encoded.clear()
        features = cached_caption_features(model, weights, "list", CAPTIONS, FLOAT32)
        number = len(encoded)
        own = encode_texts(model, model.tokenize(CAPTIONS, truncate=True))
        assert torch.allclose(features, own, rtol=2 * HALF, atol=1e-6)
        return number

    encode = model.encode_text
    model.encode_text = lambda tokens, **options: (
        encoded.extend(tokens) or encode(tokens, **options)
    )
    assert (searched(model, weights, folder), captions()) == (6, 4)
    with torch.no_grad():
        model.logit_scale += 1
        (model.visual.proj if tower == "image" else model.text_projection).normal_()
    found = searched(model, weights, folder), captions()
    assert found == ((6, 0) if tower == "image" else (0, 4))


def test_each_folder_and_each_weights_file_keeps_what_it_has(weights, folder, tmp_path):
    """Searched in turns, and captions beside them."""
    model, other, last = demo(), tmp_path / "others", weights.with_name("last.pth")
    last.touch()
    for i in range(2):
        draw(other / f"{i}.png", 50 + i)
    assert [searched(model, weights, each) for each in (folder, other)] == [6, 2]
    cached_caption_features(model, weights, str(folder.resolve()), CAPTIONS, FLOAT32)
    assert searched(demo(1), last, folder) == 6
    assert [searched(model, weights, each) for each in (folder, other)] == [0, 0]
    assert searched(demo(1), last, folder) == 0


def test_another_pillow_may_decode_otherwise(weights, folder, monkeypatch):
    assert searched(demo(), weights, folder) == 6
    monkeypatch.setattr("PIL.__version__", "0.0")
    assert searched(demo(), weights, folder) == 6


def damaged(content: bytes):
    """What can become of a file."""
    yield content[: len(content) // 2]
    yield b""
    yield b"\xff" * 100
    yield content[:20] + bytes([content[20] ^ 1]) + content[21:]


def test_a_damaged_store_is_computed_anew(weights, folder):
    model = demo()

    def file() -> Path:
        (found,) = weights.parents[1].rglob(store.FILES)
        return found

    searched(model, weights, folder)
    for content in damaged(file().read_bytes()):
        file().write_bytes(content)
        assert searched(model, weights, folder) == 6
        assert searched(model, weights, folder) == 0
    save_file({"features": torch.zeros(6, 256)}, file())  # another program's
    assert searched(model, weights, folder) == 6
    file().unlink()  # by the user
    assert searched(model, weights, folder) == 6


def test_where_nothing_can_be_written_a_search_works_and_says_so(weights, folder, capsys):
    """A file stands where their folder would: that stops the superuser as well."""
    (weights.parents[1] / "features").touch()
    assert searched(demo(), weights, folder) == 6
    assert "warning: features are not cached: " in capsys.readouterr().out


def test_what_a_run_brings_is_used_where_it_cannot_be_written(weights, folder, monkeypatch):
    searched(demo(), weights, folder)
    monkeypatch.setattr(store, "atomic_write", None)  # nothing may be written
    assert searched(demo(), weights, folder) == 0


def test_weights_in_no_run_have_features_beside_them(tmp_path, folder):
    weights = tmp_path / "models_pth" / "ViT.pt"
    save_weights(demo(), weights)
    searched(demo(), weights, folder)
    assert [len(keys) for keys in stored(weights.parent / "features")] == [6]


def test_images_that_cannot_be_read_are_named_and_passed_over(weights, folder, capsys):
    (folder / "broken.jpg").write_text("no image")
    for _ in range(2):
        images, features = image_features(demo(), weights, folder, find_images(folder), FLOAT32)
        assert len(images) == len(features) == 6 and Path("broken.jpg") not in images
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
        assert "not an image" in line and line.endswith("passed over")


def test_features_that_are_not_finite_are_not_cached(weights, folder):
    model = demo()
    with torch.no_grad():
        model.visual.proj.fill_(math.inf)
    with pytest.raises(InputError, match="not finite"):
        image_features(model, weights, folder, find_images(folder), FLOAT32)
    assert not list(weights.parents[1].rglob(store.FILES))


def test_ctrl_c_keeps_what_was_encoded(weights, folder, monkeypatch, capsys):
    monkeypatch.setattr("utils.retrieval.search.BATCH_SIZE", 2)

    class Interrupted(Counted):
        def encode_image(self, images, normalize):
            if self.images == 4:
                raise KeyboardInterrupt
            return super().encode_image(images, normalize)

    with pytest.raises(KeyboardInterrupt):
        image_features(Interrupted(demo()), weights, folder, find_images(folder), FLOAT32)
    assert "features of 4 images are cached in " in capsys.readouterr().out
    assert searched(demo(), weights, folder) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_ends_no_search(weights, folder, capsys):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert searched(demo(), weights, folder) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    printed = capsys.readouterr().out
    assert "warning: features are not cached: " in printed and "File too large" in printed
    assert "are cached in" not in printed and not list(weights.parents[1].rglob(".*"))
