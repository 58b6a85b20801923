"""Small worlds to fine-tune in: a model learns one, then another, and may forget the first.

A    the demo set: coloured shapes, and captions that name five attributes
B    the same captions, but images whose colours are turned by a quarter of the colour circle, and
     which are blurred and noisy
B2   images as in A, but of other shapes, and captions in words that A's do not have

The foundation has the shapes of A and of B2, each in its words, and no two images look alike: each
has a turn of its hues, a blur and a noise of its own. The other worlds are shifts of it. In all of
them the validation and test images show the same scenes, which no training image shows.

Each has training, validation and test images, none of which shows what another one shows. A seed
gives a world of its own, with the same files whenever it is rendered.
"""

import random
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import measure  # noqa: F401  the repository's packages can be imported
import numpy as np
from PIL import Image, ImageFilter

from flickr8k import render_demo as demo
from flickr8k.render_demo import Points, Scene, Wording
from utils.data.annotations import annotations_json, write_set

OTHER_OUTLINES = {
    "diamond": demo._fitted([(0, -1.3), (1, 0), (0, 1.3), (-1, 0)], 1.1),
    "hexagon": demo._fitted(demo._arc(1.0, 0, 360, steps=6)[:-1], 1.0),
    "house": demo._fitted([(-1, 1), (-1, -0.1), (0, -1.1), (1, -0.1), (1, 1)], 0.98),
    "hourglass": demo._fitted([(-1, -1), (1, -1), (-1, 1), (1, 1)], 1.0),
    "arrow": demo._fitted(
        [(-1, -0.35), (0, -0.35), (0, -1), (1, 0), (0, 1), (0, 0.35), (-1, 0.35)], 1.05
    ),
    "stairs": demo._fitted(
        [(-1, 1), (-1, 0.33), (-0.33, 0.33), (-0.33, -0.33), (0.33, -0.33), (0.33, -1), (1, -1),
         (1, 1)], 0.98,
    ),
}  # fmt: skip
OTHER_WORDING = Wording(
    sentences=(
        "Drawing of one {size} {colour} {shape}: {place}, {background} paper.",
        "We see {shape} art, {size}, {colour}; it floats {place} over {background} paint.",
        "{background} wallpaper, printed {place} with one {size} {colour} {shape}.",
        "Icon: {colour} {shape}, {size}, {place}, canvas {background}.",
        "My {background} card shows, {place}, one {colour} {shape}, {size}.",
        "Look {place}: {size} {shape}, painted {colour}, behind it all {background}.",
        "This {shape} looks {size} and {colour}; find it {place}, {background} around it.",
    ),
    words={
        "diamond": ("diamond", "rhombus"),
        "hexagon": ("hexagon",),
        "house": ("house", "hut"),
        "hourglass": ("hourglass",),
        "arrow": ("arrow",),
        "stairs": ("stairs", "staircase"),
        "red": ("scarlet", "crimson"),
        "orange": ("tangerine",),
        "yellow": ("golden",),
        "green": ("emerald",),
        "blue": ("azure",),
        "purple": ("violet",),
        "pink": ("rose",),
        "brown": ("chocolate",),
        "white": ("blank", "snowy"),
        "grey": ("silver",),
        "cream": ("vanilla",),
        "mint": ("seafoam",),
        "lavender": ("lilac",),
        "navy": ("midnight",),
        "small": ("tiny", "miniature"),
        "large": ("huge", "giant"),
        "top left": ("northwest",),
        "top": ("north",),
        "top right": ("northeast",),
        "left": ("west",),
        "middle": ("central", "amid"),
        "right": ("east",),
        "bottom left": ("southwest",),
        "bottom": ("south",),
        "bottom right": ("southeast",),
    },
)


class Look(NamedTuple):
    """How images look: for each of the three the least and the most, between which an image has a
    value of its own."""

    hue: tuple[float, float] = (0, 0)  # in 256 steps around the colour circle
    blur: tuple[float, float] = (0, 0)  # pixels, the radius of the Gaussian
    noise: tuple[float, float] = (0, 0)  # of 255 levels, the standard deviation


class World(NamedTuple):
    """What images show and in which words, and how they look."""

    sides: tuple[tuple[Mapping[str, Points], Wording], ...]  # shapes, and how they are described
    look: Look | None = None  # as they are drawn


EN = demo.WORDINGS["en"]
UNSEEN = {
    "red": ("vermilion",),
    "orange": ("amber",),
    "yellow": ("lemon",),
    "green": ("olive",),
    "blue": ("cobalt",),
    "purple": ("mauve",),
    "pink": ("fuchsia",),
    "brown": ("umber",),
}
VARIED = Look(hue=(-8, 8), blur=(0, 0.8), noise=(0, 12))
BOTH = ((demo.OUTLINES, EN), (OTHER_OUTLINES, OTHER_WORDING))
RENAMED = tuple((shapes, Wording(w.sentences, w.words | UNSEEN)) for shapes, w in BOTH)
SHIFTS = {
    "hues turned": World(BOTH, VARIED._replace(hue=(20, 36))),
    "blurred and noisy": World(BOTH, VARIED._replace(blur=(3, 4), noise=(80, 100))),
    "new words for colours": World(RENAMED, VARIED),
}
WORLDS = {
    "A": World(BOTH[:1]),
    "B": World(BOTH[:1], Look(hue=(64, 64), blur=(1, 1), noise=(16, 16))),
    "B2": World(BOTH[1:]),
    "foundation": World(BOTH, VARIED),
    **SHIFTS,
}
IMAGES = {
    "A": {"train": 2000, "val": 200, "test": 400},
    **{name: {"train": 600, "val": 200, "test": 400} for name in ("B", "B2")},
    "foundation": {"test": 400, "val": 200, "train": 8000},
    # Ten epochs of 93 batches of 64 images are 930 steps, as on Flickr8k's 6,000.
    **{name: {"test": 400, "val": 200, "train": 93 * 64} for name in SHIFTS},
}


def render_world(root: Path, name: str, seed: int) -> Path:
    """Write the world of this name and seed into `root`, unless it is there, and return `root`."""
    sides, look = WORLDS[name]
    outlines = {shape: points for shapes, _ in sides for shape, points in shapes.items()}
    wordings = {shape: wording for shapes, wording in sides for shape in shapes}
    scenes = [
        Scene(*values)
        for values in product(outlines, demo.COLOURS, demo.RADII, demo.PLACES, demo.BACKGROUNDS)
    ]
    rng = random.Random(f"{'foundation' if name in SHIFTS else name} {seed}")
    noise = np.random.default_rng([seed, *name.encode()])
    drawn = iter(rng.sample(scenes, len(scenes)))
    images, annotations = {}, {}
    for split, number in IMAGES[name].items():
        files = {f"images/{split}_{i:04}.png": next(drawn) for i in range(number)}
        captions = [
            (file, demo.describe(scene, wordings[scene.shape], rng))
            for file, scene in files.items()
        ]
        annotations[root / f"en_{split}.json"] = annotations_json(captions)
        images |= files

    def write_image(file: str, path: Path) -> None:
        image = demo.draw(images[file], rng, outlines)
        (shifted(image, look, noise) if look else image).save(path)

    complete = all((root / file).is_file() for file in images)
    write_set(
        root,
        images=[] if complete else list(images),
        write_image=write_image,
        annotations=annotations,
        progress=f"rendering {name}, seed {seed}",
    )
    return root


def shifted(image: Image.Image, look: Look, rng: np.random.Generator) -> Image.Image:
    """The image with its hues turned, blurred, and with Gaussian noise."""
    hue, blur, noise = (rng.uniform(*limits) for limits in look)
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(round(hue) % 256)  # bytes wrap, as hues do
    turned = Image.fromarray(pixels, "HSV").convert("RGB")
    blurred = np.array(turned.filter(ImageFilter.GaussianBlur(blur)))
    noisy = blurred + rng.normal(0, noise, blurred.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
