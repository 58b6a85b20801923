"""Plots and pictures: scores, ranked captions, found images, WiSE-FT, confusion matrices."""

import io
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.errors import one_line
from utils.retrieval.ranking import Ranked
from utils.retrieval.scores import K_VALUES, TITLES, Scores
from utils.retrieval.tables import retained
from utils.runs.files import atomic_write, picture_format, writing

LETTERS = 105  # capitals in a line of an inch, at a font size of one point
LINES = 3  # of a caption, at most
NAMED_CLASSES = 50  # in a confusion matrix: more names would be too small to read
NAME_LENGTH = 30  # characters of a class's name
NUMBERED_CLASSES = 20  # with more, numbers would not fit into the cells
COLUMNS = 6  # of found images at most
CHINESE_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
                 "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei")  # fmt: skip


def plot_scores(scores: Scores, path: Path) -> None:
    """Write a plot of Recall@K and mAP@K against K from 1 to 10 to `path`, a panel a direction."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    top = max(*scores.i2t.recall.values(), *scores.t2i.recall.values())  # mAP is never higher
    for panel, (title, way) in zip(panels, scores.by_title().items(), strict=True):
        curves = (("Recall@K", way.recall, "o-", 6), ("mAP@K", way.map_at, "s--", -14))
        for label, points, style, above in curves:
            (line,) = panel.plot(list(points), list(points.values()), style, label=label)
            for k in K_VALUES:
                beside = "right" if k == 1 and above > 0 else "center"  # of a curve that rises
                panel.annotate(f"{points[k]:.1f}", (k, points[k]), (0, above), ha=beside,
                               textcoords="offset points", color=line.get_color())  # fmt: skip
        panel.set(title=title.capitalize(), xlabel="K", xticks=list(points), xlim=(0.2, 10.5))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if way.map_at[1] > top / 2 else "upper left")
    panels[0].set(ylabel="percent", ylim=(0, min(1.15 * top, 108)))
    save_figure(figure, path)


def plot_losses(training: Sequence[float], validation: Sequence[float], path: Path) -> None:
    """Write a plot of the losses of each epoch, from 1."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, losses, style in (("training", training, "o-"), ("validation", validation, "s--")):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(title="Loss of each epoch", xlabel="epoch", ylabel="loss")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def chart_svg(curves: dict[str, dict[float, float]], chosen: float | None = None) -> bytes:
    """An SVG with curves, {name: {x: y}} with whole numbers x, and a line at the `chosen` x."""
    figure = Figure(figsize=(5, 2.9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # room for a number at the very top
    axes = figure.subplots()
    for style, (name, points) in zip(("o-", "s--"), curves.items(), strict=False):
        label = f"{name} {list(points.values())[-1]:.3g}".lstrip()
        axes.plot(list(points), list(points.values()), style, markersize=4, label=label)
    if chosen is not None:
        axes.axvline(chosen, color="0.4", linestyle=":", label=f"chosen: {chosen:g}", zorder=1)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none"}):  # letters stay text
        figure.savefig(file, format="svg", transparent=True)
    return file.getvalue()


def fonts_for(text: str) -> list[str]:
    """Names of fonts for matplotlib, which draws each character with the first font that has it.
    Prints what to install for Chinese characters."""
    own = "DejaVu Sans"
    if not any("\u4e00" <= character <= "\u9fff" for character in text):
        return [own]
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in known:  # installed since matplotlib last looked
            with suppress(Exception):  # what matplotlib cannot read is no font for it
                font_manager.fontManager.addfont(file)
    names = {font.name for font in font_manager.fontManager.ttflist}
    chinese = [name for name in CHINESE_FONTS if name in names]
    if not chinese:
        print("Chinese is drawn as boxes: install Noto Sans CJK (apt install fonts-noto-cjk)")
    return [own, *chinese]


def draw_ranking(image: Image.Image, ranked: list[Ranked], path: Path) -> None:
    """Write a picture: the image, and beside it each caption's probability and similarity."""
    captions = [_filled(one_line(r.caption), 4.3, 10) for r in ranked]  # no control characters
    fonts = fonts_for("".join(captions))
    heights = [0.25 + 0.19 * (1 + caption.count("\n")) for caption in captions]
    height = max(3.0, sum(heights) + 0.8)
    figure, page = _page(12.2, height)
    _put_image(page, image, (0.2, 0.2, 4, height - 0.4))
    middle = (height - sum(heights)) / 2
    heading = {"fontsize": 8, "color": "dimgrey", "ha": "right", "va": "center"}
    page.text(5.2, middle - 0.1, "probability", **heading)
    page.text(7.5, middle - 0.1, "similarity", **heading)
    highest = max(r.probability for r in ranked) or 1
    for caption, (_, probability, similarity), space in zip(captions, ranked, heights, strict=True):
        middle += space / 2
        number = {"fontsize": 9, "ha": "right", "va": "center"}
        page.text(5.2, middle, f"{100 * probability:.3g}%", **number)
        page.barh(middle, 1.5 * probability / highest, 0.2, left=5.3, color="tab:blue")
        page.text(7.5, middle, f"{similarity:.3f}", **number)
        page.text(7.7, middle, caption, fontfamily=fonts, fontsize=10, va="center",
                  parse_math=False)  # fmt: skip
        middle += space / 2
    save_figure(figure, path)


def draw_found(query: str, found: list[tuple[Image.Image, str]], path: Path) -> None:
    """Write a picture: the query, and below it the images, of equal heights, with their captions.
    Panoramas are lower: none is wider than a landscape photograph."""
    rows = math.ceil(len(found) / COLUMNS)
    columns = math.ceil(len(found) / rows)
    widest = max(image.width / image.height for image, _ in found)
    height, width = 2.0, 2.0 * min(max(widest, 0.9), 1.6)
    page_width = max(6.0, columns * (width + 0.2) + 0.2)
    heading = _filled(one_line(query), page_width - 0.4, 13)
    captions = [_filled(one_line(caption), width, 8) for _, caption in found]
    fonts = fonts_for("".join([heading, *captions]))
    top = 0.4 + 0.25 * (1 + heading.count("\n"))
    row_height = height + 0.25 + 0.15 * (1 + max(caption.count("\n") for caption in captions))
    figure, page = _page(page_width, top + rows * row_height)
    style = {"fontfamily": fonts, "parse_math": False, "va": "top"}
    page.text(0.2, 0.2, heading, fontsize=13, **style)
    for place, ((image, _), caption) in enumerate(zip(found, captions, strict=True)):
        row, column = divmod(place, columns)
        left, upper = 0.2 + column * (width + 0.2), top + row * row_height
        _put_image(page, image, (left, upper, width, height))
        page.text(left + width / 2, upper + height + 0.06, caption, fontsize=8, ha="center",
                  **style)  # fmt: skip
    save_figure(figure, path)


def _page(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure, and axes that cover it, in inches from its left upper corner."""
    figure = Figure(figsize=(width, height))
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    page.axis("off")
    return figure, page


def _put_image(page: Axes, image: Image.Image, box: tuple[float, float, float, float]) -> None:
    """Draw an image, as large as fits, in the middle of the box (left, top, width, height)."""
    left, top, width, height = box
    scale = min(width / image.width, height / image.height)
    x, y = left + width / 2, top + height / 2
    across, down = scale * image.width / 2, scale * image.height / 2
    page.imshow(image, extent=(x - across, x + across, y + down, y - down), aspect="auto")


def _filled(text: str, inches: float, size: float) -> str:
    """A text wrapped at a width, for a font size in points; Chinese characters take two letters."""
    wide = "".join(c + "\0" * (unicodedata.east_asian_width(c) in "WF") for c in text)
    lines = textwrap.wrap(wide, int(LETTERS * inches / size))
    rest = " ..." if len(lines) > LINES else ""
    return "\n".join(lines[:LINES]).replace("\0", "") + rest


def plot_wise_ft(
    rows: list[dict[str, float]], best: dict[str, float], path: Path, max_forgetting: float
) -> None:
    """Write a plot against alpha: mean recall and R@1 on the new data; in a second panel the scores
    on the sets of --retention, with a line at `max_forgetting`. A star stands at the row `best`."""
    panels = {"new data: validation": {"mean recall": [row["mean_recall"] for row in rows]}}
    for way, title in TITLES.items():
        panels["new data: validation"][f"R@1, {title}"] = [row[f"{way}_R@1"] for row in rows]
    if sets := {name: [retained(row)[name] for row in rows] for name in retained(best)}:
        means = [sum(scores) / len(scores) for scores in zip(*sets.values(), strict=True)]
        panels["old data: --retention"] = ({"mean": means} if len(sets) > 1 else {}) | sets
    figure = Figure(figsize=(5.6 * len(panels), 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        _draw_paths(axes, rows, curves)
        if sets and axes is all_axes[1]:
            lowest = means[0] + rows[0]["points_lost"] - max_forgetting
            axes.axhline(lowest, color="k", ls=":", label=f"{max_forgetting:g} points lost")
        chosen = best["alpha"], next(iter(curves.values()))[rows.index(best)]
        axes.axvline(chosen[0], color="0.6", ls=":", zorder=1)
        axes.plot(*chosen, "*", color="gold", markeredgecolor="k", markersize=18, zorder=3,
                  label=f"chosen: alpha {best['alpha']:g}")  # fmt: skip
        axes.set(title=title, xlabel="alpha (0: before training, 1: after)", ylabel="percent")
        axes.grid(alpha=0.3)
        fonts = {"family": fonts_for("".join(curves)), "size": 9}
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, prop=fonts)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold a $
    save_figure(figure, path)


def _draw_paths(
    axes: Axes, rows: list[dict[str, float]], curves: Mapping[str, Sequence[float]]
) -> None:
    """Draw scores against alpha: a colour for each of the `curves`, a style for each epoch."""
    epochs = dict.fromkeys(row["epoch"] for row in rows)
    for number, (name, scores) in enumerate(curves.items()):
        for epoch, style in zip(epochs, ("o-", "s--"), strict=False):
            points = sorted(
                (row["alpha"], score)
                for row, score in zip(rows, scores, strict=True)
                if row["alpha"] == 0 or row["epoch"] == epoch
            )
            label = f"{name}, epoch {epoch}" if len(epochs) > 1 else name
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)


def plot_confusion(confusions: dict[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Write a plot of confusion matrices `[c, c]` in images, a panel for each title. The colour is
    the share of the row's images; few classes are named, and fewer have numbers in the cells."""
    names = [one_line(name)[:NAME_LENGTH] for name in classes]
    names = names if len(names) <= NAMED_CLASSES else []
    numbered = len(classes) <= NUMBERED_CLASSES
    side = 3 + (0.4 if numbered else 0.22) * min(len(classes), NAMED_CLASSES)
    figure = Figure(figsize=(side * len(confusions) + 1.5, side), layout="constrained")
    panels = figure.subplots(1, len(confusions), sharey=True, squeeze=False)[0]
    style = {"fontfamily": fonts_for("".join(names)), "fontsize": 8, "parse_math": False}
    for panel, (title, confusion) in zip(panels, confusions.items(), strict=True):
        share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True)
        colours = panel.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
        panel.set(title=title, xlabel="taken for")
        for row, column in confusion.nonzero().tolist() if numbered else ():
            panel.text(column, row, int(confusion[row, column]), ha="center", va="center",
                       fontsize=12 - len(classes) // 4,
                       color="w" if share[row, column] > 50 else "k")  # fmt: skip
        if names:
            panel.set_xticks(range(len(names)), names, rotation=90, **style)
            panel.set_yticks(range(len(names)), names, **style)
    panels[0].set(ylabel="class")
    figure.colorbar(colours, ax=panels, label="percent of the class's images", shrink=0.8)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, PNG without one; or `InputError`."""
    kind = picture_format(path)
    with warnings.catch_warnings(), writing(path), atomic_write(path) as temporary:
        warnings.simplefilter("ignore", UserWarning)  # of missing characters: see `fonts_for`
        figure.savefig(temporary, format=kind, dpi=120)
