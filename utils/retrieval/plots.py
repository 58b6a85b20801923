"""Plots and pictures: scores, ranked captions, found images, WiSE-FT, confusion matrices."""

import io
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.errors import one_line
from utils.retrieval.ranking import Ranked
from utils.retrieval.scores import K_VALUES, TITLES, Scores
from utils.retrieval.tables import retained
from utils.runs.files import atomic_write, picture_format, writing

LINE = 68  # letters in a line of a caption; half as many Chinese characters
NAMED_CLASSES = 50  # in a confusion matrix: more names would be too small to read
NAME_LENGTH = 30  # characters of a class's name
COLUMNS = 4  # of found images
NARROW_LINE = 36  # letters in a line above a found image
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
                panel.annotate(f"{points[k]:.1f}", (k, points[k]), (0, above), ha="center",
                               textcoords="offset points", color=line.get_color())  # fmt: skip
        panel.set(title=title.capitalize(), xlabel="K", xticks=list(points), xlim=(0.5, 10.5))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if way.map_at[1] > top / 2 else "upper left")
    panels[0].set(ylabel="percent", ylim=(0, min(1.15 * top, 108)))
    save_figure(figure, path)


def chart_svg(curves: dict[str, dict[float, float]]) -> bytes:
    """An SVG with curves, {name: {x: y}} with whole numbers x; the legend has the last values."""
    figure = Figure(figsize=(4, 2.2), layout="constrained")
    axes = figure.subplots()
    for style, (name, points) in zip(("o-", "s--"), curves.items(), strict=False):
        label = f"{name} {list(points.values())[-1]:.3g}".lstrip()
        axes.plot(list(points), list(points.values()), style, markersize=4, label=label)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
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
        print("no Chinese font is installed: pictures show boxes; install Noto Sans CJK "
              "(apt install fonts-noto-cjk)")  # fmt: skip
    return [own, *chinese]


def draw_ranking(image: Image.Image, ranked: list[Ranked], path: Path) -> None:
    """Write a picture: the image, and beside it the captions with their probabilities."""
    captions = [one_line(r.caption) for r in ranked]  # no control characters, no whole pages
    fonts = fonts_for("".join(captions))
    figure = Figure(figsize=(11, 4), layout="constrained")
    picture, chart = figure.subplots(1, 2, width_ratios=[1, 1.4])
    picture.imshow(image)
    picture.axis("off")
    rows = range(len(ranked))
    chart.barh(rows, [r.probability for r in ranked], height=0.3, color="tab:blue", alpha=0.6)
    for row, (_, probability, similarity) in enumerate(ranked):
        caption = f"{captions[row]}  ({probability:.1%}, similarity {similarity:.3f})"
        chart.text(0, row - 0.22, _filled(caption, LINE), va="bottom", fontfamily=fonts, fontsize=9,
                   parse_math=False)  # fmt: skip
    chart.set(xlim=(0, 1), ylim=(len(ranked) - 0.5, -0.9), yticks=[], xlabel="probability")
    chart.spines[["top", "right", "left"]].set_visible(False)
    save_figure(figure, path)


def draw_found(query: str, found: list[tuple[Image.Image, str]], path: Path) -> None:
    """Write a picture: the query, and below it the images with their captions."""
    query, captions = one_line(query), [one_line(caption) for _, caption in found]
    fonts = fonts_for(query + "".join(captions))
    columns = min(COLUMNS, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3 * columns, 0.6 + 3 * rows), layout="constrained")
    figure.suptitle(_filled(query, 30 * columns), fontfamily=fonts, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    for panel, (image, _), caption in zip(panels, found, captions, strict=False):
        panel.imshow(image)
        panel.set_title(_filled(caption, NARROW_LINE), fontfamily=fonts, fontsize=8,
                        parse_math=False)  # fmt: skip
    save_figure(figure, path)


def _filled(text: str, line: int) -> str:
    """A text wrapped at `line` letters, or half as many Chinese characters."""
    width = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return textwrap.fill(text, max(1, line * len(text) // max(1, width)))


def plot_wise_ft(
    rows: list[dict[str, float]], best: dict[str, float], path: Path, max_forgetting: float
) -> None:
    """Write a plot of mean recall, R@1 and the scores on the sets of --retention against alpha,
    with a star at the chosen row `best`, and a line where the sets' mean is `max_forgetting` points
    lower. Of the epochs mixed with the start, those besides the chosen one have mean recall alone.
    """
    rows = sorted(rows, key=lambda row: row["alpha"])
    others = [row for row in rows if row["epoch"] != best["epoch"]]
    rows = [row for row in rows if row["epoch"] == best["epoch"] or row["alpha"] == 0]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    alphas = [row["alpha"] for row in rows]
    curves = {"mean recall": "mean_recall"} | {
        f"R@1, {t}": f"{way}_R@1" for way, t in TITLES.items()
    }
    for label, name in curves.items():
        axes.plot(alphas, [row[name] for row in rows], "o-", label=label)
    if others:
        axes.plot([row["alpha"] for row in others], [row["mean_recall"] for row in others], "o:",
                  color="C0", label="mean recall, the other epoch")  # fmt: skip
    by_set = {f"retention, {n}": [retained(row)[n] for row in rows] for n in retained(best)}
    for label, scores in by_set.items():
        axes.plot(alphas, scores, "s--", label=label)
    if by_set:
        means = [sum(scores) / len(scores) for scores in zip(*by_set.values(), strict=True)]
        if len(by_set) > 1:
            axes.plot(alphas, means, "k--", label="retention, mean")
        limit = means[0] + rows[0]["points_lost"] - max_forgetting
        axes.axhline(
            limit, color="k", linestyle=":", label=f"at most {max_forgetting:g} points lost"
        )
    axes.plot(best["alpha"], best["mean_recall"], "k*", markersize=14, label="chosen", zorder=3)
    axes.set(xlabel="alpha (0: the starting weights, 1: the tuned ones)", ylabel="percent")
    axes.grid(alpha=0.3)
    legend = figure.legend(
        loc="outside lower center", ncols=3, prop={"family": fonts_for("".join(by_set))}
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may hold a $
    save_figure(figure, path)


def plot_confusion(confusions: dict[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Write a plot of confusion matrices `[c, c]` in images, a panel for each title. The colour is
    the share of the row's images; few classes are named."""
    names = [one_line(name)[:NAME_LENGTH] for name in classes]
    names = names if len(names) <= NAMED_CLASSES else []
    side = 3 + 0.22 * min(len(classes), NAMED_CLASSES)
    figure = Figure(figsize=(side * len(confusions) + 1.5, side), layout="constrained")
    panels = figure.subplots(1, len(confusions), sharey=True, squeeze=False)[0]
    style = {"fontfamily": fonts_for("".join(names)), "fontsize": 8, "parse_math": False}
    for panel, (title, confusion) in zip(panels, confusions.items(), strict=True):
        share = 100 * confusion.double() / confusion.sum(dim=1, keepdim=True)
        colours = panel.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=100)
        panel.set(title=title, xlabel="taken for")
        if names:
            panel.set_xticks(range(len(names)), names, rotation=90, **style)
            panel.set_yticks(range(len(names)), names, **style)
    panels[0].set(ylabel="class")
    figure.colorbar(colours, ax=panels, label="percent of the class's images", shrink=0.8)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, PNG without one. Raises `InputError` if
    the format is unknown or the file cannot be written."""
    kind = picture_format(path)
    with warnings.catch_warnings(), writing(path), atomic_write(path) as temporary:
        warnings.simplefilter("ignore", UserWarning)  # of missing characters: see `fonts_for`
        figure.savefig(temporary, format=kind, dpi=120)
