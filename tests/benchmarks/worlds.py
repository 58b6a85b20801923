"""Small worlds to fine-tune in: a model learns one, then another, and may forget the first.

A    the demo set: coloured shapes, and captions that name five attributes
B    the same captions, but images whose colours are turned by a quarter of the colour circle, and
     which are blurred and noisy
B2   images as in A, but of other shapes, and captions in words that A's do not have

Each has training, validation and test images, none of which shows what another one shows. A seed
gives a world of its own, with the same files whenever it is rendered.
"""

import random
from itertools import product
from pathlib import Path

import measure  # noqa: F401  the repository's packages can be imported
import numpy as np
from PIL import Image, ImageFilter

from flickr8k import render_demo as demo
from flickr8k.render_demo import Scene, Wording
from utils.data.annotations import annotations_json, write_set

IMAGES = {  # training, validation and test images
    "A": {"train": 2000, "val": 200, "test": 400},
    "B": {"train": 600, "val": 200, "test": 400},
    "B2": {"train": 600, "val": 200, "test": 400},
}
HUE = 64  # of 256 steps around the colour circle
BLUR = 1.0  # pixels, the radius of the Gaussian
NOISE = 16.0  # of 255 levels, the standard deviation

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


def render_world(root: Path, name: str, seed: int) -> Path:
    """Write the world of this name and seed into `root`, unless it is there, and return `root`."""
    wording, outlines = demo.WORDINGS["en"], demo.OUTLINES
    if name == "B2":
        wording, outlines = OTHER_WORDING, OTHER_OUTLINES
    scenes = [
        Scene(*values)
        for values in product(outlines, demo.COLOURS, demo.RADII, demo.PLACES, demo.BACKGROUNDS)
    ]
    rng = random.Random(f"{name} {seed}")
    noise = np.random.default_rng([seed, len(name)])
    drawn = iter(rng.sample(scenes, sum(IMAGES[name].values())))
    images, annotations = {}, {}
    for split, number in IMAGES[name].items():
        files = {f"images/{split}_{i:04}.png": next(drawn) for i in range(number)}
        captions = [(file, demo.describe(scene, wording, rng)) for file, scene in files.items()]
        annotations[root / f"en_{split}.json"] = annotations_json(captions)
        images |= files

    def write_image(file: str, path: Path) -> None:
        image = demo.draw(images[file], rng, outlines)
        (shifted(image, noise) if name == "B" else image).save(path)

    complete = all((root / file).is_file() for file in images)
    write_set(
        root,
        images=[] if complete else list(images),
        write_image=write_image,
        annotations=annotations,
        progress=f"rendering {name}, seed {seed}",
    )
    return root


def shifted(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image with all hues turned by a quarter, blurred, and with Gaussian noise."""
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += HUE  # bytes wrap, as hues do
    turned = Image.fromarray(pixels, "HSV").convert("RGB")
    blurred = np.array(turned.filter(ImageFilter.GaussianBlur(BLUR)))
    noisy = blurred + rng.normal(0, NOISE, blurred.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
