"""Render the demo set: 2,000 training and 200 validation images of coloured shapes, 64x64 pixels,
with five English and five Chinese captions each. An image shows one object. No two images have the
same shape, colour, size, place and background, and every caption names all five."""

import math
import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from utils.data.annotations import annotations_json, write_set

Colour = tuple[int, int, int]  # red, green and blue, from 0 to 255
Points = list[tuple[float, float]]  # x to the right, y down

IMAGE_SIZE = 64  # pixels
SUPERSAMPLING = 4  # shapes are drawn so many times larger, then reduced, for smooth edges
PLACE_SPACING = 16  # pixels between neighbouring places
JITTER = 1.5  # pixels that an object may be off its place, in each direction
SHADOW_OFFSET = 1.25  # pixels to the right, and down
SHADOW_BRIGHTNESS = 0.86  # of the background's

COLOURS: dict[str, Colour] = {
    "red": (226, 48, 48), "orange": (255, 138, 24), "yellow": (250, 212, 24),
    "green": (46, 160, 78), "blue": (44, 114, 240), "purple": (140, 64, 200),
    "pink": (255, 112, 184), "brown": (122, 74, 42),
}  # fmt: skip
# No colour of an object is among them, so the words of a caption tell its attributes in any order.
BACKGROUNDS: dict[str, Colour] = {
    "white": (252, 252, 252), "grey": (190, 194, 202), "cream": (255, 236, 200),
    "mint": (176, 236, 212), "lavender": (208, 200, 248), "navy": (28, 40, 88),
}  # fmt: skip
RADII = {"small": 7.0, "large": 12.0}  # pixels
PLACES = {  # steps of PLACE_SPACING from the centre, to the right and down
    "top left": (-1, -1), "top": (0, -1), "top right": (1, -1),
    "left": (-1, 0), "middle": (0, 0), "right": (1, 0),
    "bottom left": (-1, 1), "bottom": (0, 1), "bottom right": (1, 1),
}  # fmt: skip


def _arc(radius: float, start: float, stop: float, steps: int = 72, centre_x: float = 0) -> Points:
    """Points on a circle from angle `start` to `stop` (degrees, clockwise from the right)."""
    angles = [math.radians(start + (stop - start) * step / steps) for step in range(steps + 1)]
    return [(centre_x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star(inner_radius: float) -> Points:
    """Five tips on the unit circle, and five notches between them at `inner_radius`."""
    outer = _arc(1.0, -90, 270, steps=5)[:-1]
    inner = _arc(inner_radius, -54, 306, steps=5)[:-1]
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart(steps: int = 72) -> Points:
    """The heart curve (Weisstein, Heart Curve, MathWorld)."""
    turns = [math.tau * step / steps for step in range(steps)]
    weights = {1: -13, 2: 5, 3: 2, 4: 1}
    return [
        (16 * math.sin(t) ** 3, sum(w * math.cos(n * t) for n, w in weights.items())) for t in turns
    ]


def _cross(arm: float) -> Points:
    """A plus sign in the square from -1 to 1, with arms `2 * arm` wide."""
    quarter = [(1.0, arm), (arm, arm), (arm, 1.0), (-arm, 1.0), (-arm, arm), (-1.0, arm)]
    return quarter + [(-x, -y) for x, y in quarter]


def _fitted(points: Points, extent: float) -> Points:
    """The points with their bounding box centred at 0, and half its longer side `extent`."""
    box = [(min(axis), max(axis)) for axis in zip(*points, strict=True)]
    centre_x, centre_y = ((low + high) / 2 for low, high in box)
    scale = 2 * extent / max(high - low for low, high in box)
    return [((x - centre_x) * scale, (y - centre_y) * scale) for x, y in points]


# In units of the object's radius; with these extents all shapes look equally large.
OUTLINES = {
    "circle": _fitted(_arc(1.0, 0, 360), 1.0),
    "square": _fitted([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.88),
    "triangle": _fitted(_arc(1.0, -90, 270, steps=3), 1.08),
    "star": _fitted(_star(0.44), 1.12),
    "heart": _fitted(_heart(), 1.02),
    "ring": _fitted(_arc(1.0, 0, 360) + _arc(0.56, 360, 0), 1.02),
    "cross": _fitted(_cross(0.34), 1.0),
    "crescent": _fitted(_arc(1.0, 52.4, 307.6) + _arc(0.8, 277.9, 82.1, centre_x=0.5), 1.05),
}


class Scene(NamedTuple):
    shape: str
    colour: str
    size: str
    place: str
    background: str


ALL_SCENES = [Scene(*values) for values in product(OUTLINES, COLOURS, RADII, PLACES, BACKGROUNDS)]


class Wording(NamedTuple):
    """How a language describes a scene."""

    sentences: tuple[str, ...]  # with a gap for each attribute
    words: dict[str, tuple[str, ...]]  # value of an attribute -> the words for it


WORDINGS = {
    "en": Wording(
        sentences=(
            "A {size} {colour} {shape} {place} on a {background} background.",
            "There is a {size} {colour} {shape} {place} of the {background} picture.",
            "On a {background} background, a {size} {colour} {shape} sits {place}.",
            "A {background} picture with a {size} {colour} {shape} {place}.",
            "A {shape}, {colour} and {size}, {place} against {background}.",
            "The {colour} {shape} {place} is {size} and the background is {background}.",
            "Somebody drew a {size} {shape} in {colour} {place} of a {background} page.",
        ),
        words={
            "circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",),
            "star": ("star",), "heart": ("heart",), "ring": ("ring",),
            "cross": ("cross", "plus sign"), "crescent": ("crescent", "crescent moon"),
            **{colour: (colour,) for colour in (*COLOURS, *BACKGROUNDS)},
            "small": ("small", "little"), "large": ("large", "big"),
            "top left": ("in the top left corner", "at the upper left"),
            "top": ("at the top", "at the upper edge"),
            "top right": ("in the top right corner", "at the upper right"),
            "left": ("on the left", "at the left edge"),
            "middle": ("in the middle", "in the centre"),
            "right": ("on the right", "at the right edge"),
            "bottom left": ("in the bottom left corner", "at the lower left"),
            "bottom": ("at the bottom", "at the lower edge"),
            "bottom right": ("in the bottom right corner", "at the lower right"),
        },
    ),
    "cn": Wording(
        sentences=(
            "{background}背景上，{place}有一个{size}{colour}{shape}。",
            "图片{place}是一个{size}{colour}{shape}，背景是{background}。",
            "一个{size}{colour}{shape}画在{background}图片的{place}。",
            "{background}的画面里，{size}{colour}{shape}位于{place}。",
            "位于{place}的{shape}是{colour}的，{size}，底色是{background}。",
            "有人在{background}纸的{place}画了一个{size}{colour}{shape}。",
        ),
        words={
            "circle": ("圆形", "圆盘"), "square": ("正方形", "方块"), "triangle": ("三角形",),
            "star": ("五角星", "星星"), "heart": ("心形", "爱心"), "ring": ("圆环",),
            "cross": ("十字",), "crescent": ("月牙", "弯月"),
            "red": ("红色",), "orange": ("橙色",), "yellow": ("黄色",), "green": ("绿色",),
            "blue": ("蓝色",), "purple": ("紫色",), "pink": ("粉色",), "brown": ("棕色",),
            "white": ("白色",), "grey": ("灰色",), "cream": ("米色",), "mint": ("薄荷色",),
            "lavender": ("薰衣草色",), "navy": ("藏青色",),
            "small": ("小小的", "很小的"), "large": ("大大的", "很大的"),
            "top left": ("左上角", "左上方"), "top": ("上方", "顶部"),
            "top right": ("右上角", "右上方"), "left": ("左侧", "左边"),
            "middle": ("中央", "正中"), "right": ("右侧", "右边"),
            "bottom left": ("左下角", "左下方"), "bottom": ("下方", "底部"),
            "bottom right": ("右下角", "右下方"),
        },
    ),
}  # fmt: skip
CAPTIONS_PER_IMAGE = 5


def describe(scene: Scene, wording: Wording, rng: random.Random) -> list[str]:
    """Five captions for a scene, each with another sentence."""
    captions = []
    for sentence in rng.sample(wording.sentences, CAPTIONS_PER_IMAGE):
        words = {name: rng.choice(wording.words[value]) for name, value in scene._asdict().items()}
        captions.append(sentence.format(**words))
    return captions


def draw(
    scene: Scene, rng: random.Random, outlines: Mapping[str, Points] = OUTLINES
) -> Image.Image:
    """The scene as an RGB image; `rng` moves the object off its place."""
    background = BACKGROUNDS[scene.background]
    shadow = tuple(round(channel * SHADOW_BRIGHTNESS) for channel in background)
    centre = [
        IMAGE_SIZE / 2 + PLACE_SPACING * step + rng.uniform(-JITTER, JITTER)
        for step in PLACES[scene.place]
    ]
    canvas = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, background)
    pen = ImageDraw.Draw(canvas)
    for offset, fill in ((SHADOW_OFFSET, shadow), (0.0, COLOURS[scene.colour])):
        outline = [
            tuple(
                round((middle + offset + RADII[scene.size] * unit) * SUPERSAMPLING)
                for middle, unit in zip(centre, point, strict=True)
            )
            for point in outlines[scene.shape]
        ]
        pen.polygon(outline, fill=fill)
    return canvas.reduce(SUPERSAMPLING)


def render_demo(root: Path, seed: int = 0, n_train: int = 2000, n_val: int = 200) -> Path:
    """Write the demo set to `root`, unless it is there already, and return `root`. The same seed
    gives the same files. Raises `InputError` as `write_set` does."""
    root = Path(root)
    rng = random.Random(seed)
    files = [f"images/train_{number:04}.png" for number in range(n_train)]
    files += [f"images/val_{number:04}.png" for number in range(n_val)]
    scene_of = dict(zip(files, rng.sample(ALL_SCENES, len(files)), strict=True))
    annotations = {}
    for language, wording in WORDINGS.items():
        entries = [(file, describe(scene, wording, rng)) for file, scene in scene_of.items()]
        annotations[root / f"{language}_train.json"] = annotations_json(entries[:n_train])
        annotations[root / f"{language}_val.json"] = annotations_json(entries[n_train:])
    complete = all((root / file).is_file() for file in files)
    write_set(
        root,
        images=[] if complete else files,  # all, because `rng` draws their places one by one
        write_image=lambda file, path: draw(scene_of[file], rng).save(path),
        annotations=annotations,
        progress="rendering the demo set",
    )
    return root
