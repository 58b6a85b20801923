"""The demo set: the pixels of an image show what its captions say.

Both are read here without the renderer's code: captions with a vocabulary of their own, pixels with
definitions of the colours and shapes.
"""

import json
import re
import subprocess
import sys
from colorsys import rgb_to_hsv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flickr8k import render_demo as module
from flickr8k.render_demo import render_demo
from models.errors import InputError

SCRIPT = Path(module.__file__)
SPLITS = {"train": 2000, "val": 200}

ENGLISH = {
    "shape": {
        "circle": r"circle|disc",
        "square": r"square",
        "triangle": r"triangle",
        "star": r"star",
        "heart": r"heart",
        "ring": r"ring",
        "cross": r"cross|plus sign",
        "crescent": r"crescent",
    },
    "colour": {
        c: c for c in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
    },
    "background": {c: c for c in ("white", "grey", "cream", "mint", "lavender", "navy")},
    "size": {"small": r"small|little", "large": r"large|big"},
    "row": {"top": r"top|upper", "bottom": r"bottom|lower"},
    "column": {"left": r"left", "right": r"right"},
}
CHINESE = {
    "shape": {
        "circle": r"圆形|圆盘",
        "square": r"正方形|方块",
        "triangle": r"三角形",
        "star": r"五角星|星星",
        "heart": r"心形|爱心",
        "ring": r"圆环",
        "cross": r"十字",
        "crescent": r"月牙|弯月",
    },
    "colour": {
        "red": r"红色",
        "orange": r"橙色",
        "yellow": r"黄色",
        "green": r"绿色",
        "blue": r"蓝色",
        "purple": r"紫色",
        "pink": r"粉色",
        "brown": r"棕色",
    },
    "background": {
        "white": r"白色",
        "grey": r"灰色",
        "cream": r"米色",
        "mint": r"薄荷色",
        "lavender": r"薰衣草色",
        "navy": r"藏青色",
    },
    "size": {"small": r"小", "large": r"大"},
    "row": {"top": r"[左右]上|上方|顶部", "bottom": r"[左右]下|下方|底部"},
    "column": {"left": r"左", "right": r"右"},
}


def read_caption(caption, language):
    """{attribute: value} that a caption names. A row or column that it does not name is the middle
    one."""
    vocabulary, pattern = {"en": (ENGLISH, r"\b(?:{})\b"), "cn": (CHINESE, r"(?:{})")}[language]
    content = {}
    for attribute, values in vocabulary.items():
        named = [v for v, words in values.items() if re.search(pattern.format(words), caption)]
        if not named and attribute in ("row", "column"):
            named = ["middle"]
        assert len(named) == 1, f"{attribute} is not clear from {caption!r}: {named}"
        content[attribute] = named[0]
    return content


def hue(rgb):
    return rgb_to_hsv(*(channel / 255 for channel in rgb))[0] * 360


def object_colour_name(rgb):
    brightness = max(rgb) / 255
    bounds = [(10, "red"), (40, "orange"), (65, "yellow"), (165, "green"), (230, "blue")]
    bounds += [(290, "purple"), (345, "pink"), (360, "red")]
    name = next(name for upper, name in bounds if hue(rgb) <= upper)
    return "brown" if name == "orange" and brightness < 0.6 else name


def background_name(rgb):
    _, saturation, brightness = rgb_to_hsv(*(channel / 255 for channel in rgb))
    if brightness < 0.5:
        return "navy"
    if saturation < 0.1:
        return "white" if brightness > 0.9 else "grey"
    return next(
        n for upper, n in ((70, "cream"), (180, "mint"), (280, "lavender")) if hue(rgb) < upper
    )


def shapes_by_definition(n=48):
    """{shape: bool [n, n]}: which points of its bounding box, [-1, 1]^2 with y down, lie inside."""
    x, y = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1] * 2)
    radius = np.hypot(x, y)
    # The ten sides of a star are turned or mirrored copies of one side, which goes from a tip to
    # the notch 36 degrees further on.
    lowest = np.cos(np.radians(36))
    star_x, star_y = x * np.sin(np.radians(72)), (y + 1) / 2 * (lowest + 1) - 1
    turn = np.radians(72)
    from_tip = np.abs((np.arctan2(star_x, -star_y) + turn / 2) % turn - turn / 2)
    along, aside = (np.hypot(star_x, star_y) * f(from_tip) for f in (np.cos, np.sin))
    notch_along, notch_aside = 0.44 * np.cos(turn / 2), 0.44 * np.sin(turn / 2)
    heart_x, heart_y = x * 1.14, -(y * 1.12 - 0.12)
    crescent_x = (x + 1) * 0.805 - 1
    return {
        "circle": radius <= 1,
        "square": radius < 2,
        "triangle": np.abs(x) <= (y + 1) / 2,
        "star": (1 - along) * notch_aside >= aside * (1 - notch_along),
        "heart": (heart_x**2 + heart_y**2 - 1) ** 3 <= heart_x**2 * heart_y**3,
        "ring": (radius <= 1) & (radius >= 0.56),
        "cross": (np.abs(x) <= 0.34) | (np.abs(y) <= 0.34),
        "crescent": (np.hypot(crescent_x, y) <= 1) & (np.hypot(crescent_x - 0.5, y) > 0.8),
    }


DEFINITIONS = shapes_by_definition()


def read_pixels(path):
    """{attribute: value} that an image shows."""
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
    codes, counts = np.unique(pixels @ [2**16, 2**8, 1], return_counts=True)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    background = colours[counts.argmax()]
    share_of_light = colours / colours.sum(1, keepdims=True)
    own_hue = np.abs(share_of_light - background / background.sum()).sum(1) > 0.1  # no shadow
    colour = colours[np.where(own_hue, counts, 0).argmax()]
    mask = np.abs(pixels - colour).sum(2) < np.abs(pixels - background).sum(2)
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    n = len(DEFINITIONS["circle"])
    grid = (np.arange(n) + 0.5) / n
    box = mask[
        np.ix_(
            (top + grid * (bottom - top)).astype(int), (left + grid * (right - left)).astype(int)
        )
    ]
    overlap = {s: (box & inside).sum() / (box | inside).sum() for s, inside in DEFINITIONS.items()}
    return {
        "shape": max(overlap, key=overlap.get),
        "colour": object_colour_name(colour),
        "background": background_name(background),
        "size": "large" if max(bottom - top, right - left) > 18 else "small",
        "row": ["top", "middle", "bottom"][int((top + bottom) / 2 // (64 / 3))],
        "column": ["left", "middle", "right"][int((left + right) / 2 // (64 / 3))],
    }


def read_set(root, language):
    """The entries of both splits. Their numbers are checked."""
    entries = []
    for split, count in SPLITS.items():
        part = json.loads((root / f"{language}_{split}.json").read_text("utf-8"))
        assert len(part) == count
        entries += part
    return entries


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("set") / "demo")


def test_there_are_annotations_for_each_image_and_no_other_files(demo):
    images = [entry["image"] for entry in read_set(demo, "en")]
    assert images == [entry["image"] for entry in read_set(demo, "cn")]
    annotations = [f"{lang}_{split}.json" for lang in ("en", "cn") for split in SPLITS]
    assert len(set(images)) == 2200
    assert {p.as_posix() for p in files_of(demo)} == {*images, *annotations}


@pytest.mark.parametrize("language", ["en", "cn"])
def test_each_caption_describes_one_image_only(demo, language):
    captions, contents = [], []
    for entry in read_set(demo, language):
        assert len(entry["caption"]) == 5
        captions += entry["caption"]
        read = {tuple(read_caption(caption, language).values()) for caption in entry["caption"]}
        assert len(read) == 1
        contents += read
    assert len(set(captions)) == 5 * 2200
    assert len(set(contents)) == 2200


@pytest.mark.slow
def test_pixels_show_what_the_captions_say(demo):
    for entry, translated in zip(read_set(demo, "en"), read_set(demo, "cn"), strict=True):
        said = read_caption(entry["caption"][0], "en")
        assert read_caption(translated["caption"][0], "cn") == said
        assert read_pixels(demo / entry["image"]) == said, entry["image"]


def test_same_seed_same_bytes(tmp_path):
    first, second = (render_demo(tmp_path / name, n_train=90, n_val=9) for name in ("one", "two"))
    assert files_of(first) == files_of(second)


def test_another_seed_another_set(tmp_path):
    first, second = (render_demo(tmp_path / str(s), seed=s, n_train=20, n_val=5) for s in (0, 1))
    assert (first / "en_train.json").read_bytes() != (second / "en_train.json").read_bytes()


def test_complete_set_is_left_alone(tmp_path):
    root = render_demo(tmp_path, n_train=20, n_val=5)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    render_demo(tmp_path, n_train=20, n_val=5)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


def test_lost_image_comes_back(tmp_path):
    root = render_demo(tmp_path, n_train=20, n_val=5)
    before = files_of(root)
    (root / "images" / "train_0007.png").unlink()
    assert files_of(render_demo(tmp_path, n_train=20, n_val=5)) == before


def test_interrupted_rendering_leaves_no_half_file(tmp_path, monkeypatch):
    whole = files_of(render_demo(tmp_path / "whole", n_train=20, n_val=5))
    save, saved = Image.Image.save, []

    def break_off(image, path, *args, **kwargs):
        save(image, path, *args, **kwargs)
        saved.append(path)
        if len(saved) == 12:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt

    root = tmp_path / "broken"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", break_off)
        render_demo(root, n_train=20, n_val=5)
    left = files_of(root)
    assert len(left) == 11
    assert left.items() <= whole.items()
    assert files_of(render_demo(root, n_train=20, n_val=5)) == whole


def test_another_data_set_is_not_overwritten(tmp_path):
    (tmp_path / "cn_val.json").write_text("[]")
    with pytest.raises(InputError, match=r"cn_val\.json.*another folder"):
        render_demo(tmp_path, n_train=20, n_val=5)
    assert list(files_of(tmp_path)) == [Path("cn_val.json")]


def test_rendering_does_not_load_torch():
    code = "import sys, flickr8k.render_demo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], check=True)
