"""A page to look at: scores, curves, and for each query what was found first, hardest first."""

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from matplotlib.ticker import MaxNLocator
from PIL import Image

from models.preprocess import open_image
from models.progress_bar import progress_bar
from models.run_files import METRICS, run_folder, saved_arguments
from utils.data.annotations import SPLITS
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.encode import Features
from utils.retrieval.ranking import Answers, first_answers, rows_both_ways
from utils.retrieval.tables import K_VALUES, TITLES, Metrics, retained
from utils.runs.checkpoint import read_csv
from utils.runs.files import atomic_write, writing

LEFT, RIGHT, TOP, BOTTOM = 34, 200, 10, 152  # of the plot, in a drawing 320 wide and 175 high
LINE = 15  # from one name to the next


class Curve(NamedTuple):
    """A name with the last value, the height at which it stands beside the end, and the points: (x,
    y, what it shows)."""

    name: str
    label: float
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Curves, and the ticks of both axes with their places."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]


def draw(
    title: str, curves: dict[str, dict[float, float]], x_ticks: Sequence[int] = ()
) -> Chart | None:
    """The chart of `curves`, {name: {x: y}}. Values that are not finite are left out; None if there
    are no others. With `x_ticks`, which are chosen otherwise, the axis of y starts at 0."""

    finite = {name: {x: y for x, y in c.items() if isfinite(x + y)} for name, c in curves.items()}
    xs = sorted({x for curve in finite.values() for x in curve})
    ys = [y for curve in finite.values() for y in curve.values()]
    if not ys:
        return None
    y_ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(
        0 if x_ticks else min(ys), max(ys)
    )
    if not x_ticks:
        chosen = MaxNLocator(5, integer=True).tick_values(xs[0], xs[-1])
        x_ticks = [x for x in chosen if xs[0] <= x <= xs[-1]]
    across = partial(_place, start=xs[0], end=xs[-1], places=(LEFT, RIGHT))
    up = partial(_place, start=y_ticks[0], end=y_ticks[-1], places=(BOTTOM, TOP))
    drawn = [_curve(name, curve, across, up) for name, curve in finite.items() if curve]
    label = 0.0
    for i in sorted(range(len(drawn)), key=lambda i: drawn[i].label):
        label = max(label, drawn[i].label)
        drawn[i] = drawn[i]._replace(label=label)
        label += LINE
    return Chart(
        title,
        [(across(x), f"{x:g}") for x in x_ticks],
        [(up(y), f"{y:g}") for y in y_ticks],
        drawn,
    )


def _place(value: float, start: float, end: float, places: tuple[float, float]) -> float:
    return round(float(np.interp(value, (start, end), places)), 1)


def _curve(name: str, values: dict[float, float], across: Callable, up: Callable) -> Curve:
    points = [(across(x), up(y), f"{x:g}: {y:.4g}") for x, y in values.items()]
    last = list(values.values())[-1]
    return Curve(f"{name} {last:.3g}".lstrip(), points[-1][1], points)


FIRST = 5  # answers that are shown to a query
# What a page holds at most, so that it stays below 15 MB and opens at once.
QUERIES = {"i2t": 1000, "t2i": 5000}
PICTURES = 2000
SIDE, QUALITY = 128, 60  # of a picture, in pixels and of JPEG
EPOCH_CHARTS = {
    "loss": {"train_loss": "training", "val_loss": "validation"},
    "mean recall": {"mean_recall": ""},
}
CHINESE = regex.compile(r"\p{Han}")
# HTML has no control characters; those that Unicode has as pictures stand for them.
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


class Answer(NamedTuple):
    place: int  # from 1
    item: int  # index of the image or the caption
    similarity: float
    is_right: bool


class Card(NamedTuple):
    """A query, the rank of its best-placed right answer, and its first answers; behind them the
    best-placed right one, if it is not among them."""

    query: int
    rank: int
    answers: list[Answer]


class Direction(NamedTuple):
    """One direction: how many queries the set has, those that the page shows, hardest first, and
    {filter: how many it leaves}."""

    way: str
    queries: int
    cards: list[Card]
    counts: dict[str, str]


def write_report(
    path: Path, weights: str | Path, dataset: Flickr8kDataset, features: Features, metrics: Metrics
) -> None:
    """Write one HTML file, which needs no other file and no network, about the scores of `weights`
    on `dataset`: `metrics` (K from 1 to 10), their curves, the arguments and the epochs of the run
    that the weights belong to, and the first answers to the queries.

    Raises `InputError` for an image that cannot be read, for a damaged arguments.json or
    metrics.csv of the run, and if the file cannot be written.
    """
    run = run_folder(weights)
    table = run / METRICS if run else None
    epochs = read_csv(table) if table and table.exists() else []
    directions, shown = _directions(dataset, features)
    page = _render(
        weights=weights,
        dataset=dataset,
        split=SPLITS[dataset.split],
        metrics=metrics,
        charts=_charts(metrics, epochs),
        arguments=saved_arguments(run) if run else {},
        directions=directions,
        first_captions=[dataset.text[own[0]] for own in dataset.own_captions.values()],
        names=[Path(image).relative_to(dataset.root).as_posix() for image in dataset.image],
        pictures=_pictures(dataset, shown),
    )
    with writing(path), atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))  # for halves of characters


def _directions(dataset: Flickr8kDataset, features: Features) -> tuple[list[Direction], list[int]]:
    """Both directions, and the indices of the images that they show."""
    images, texts = map(len, features)
    rows_of = rows_both_ways(*features)
    of_images = first_answers(rows_of["i2t"], images, texts, dataset.img_to_txt, FIRST)
    of_texts = first_answers(rows_of["t2i"], texts, images, dataset.txt_to_img, FIRST)
    image_cards, text_cards = _cards(of_images, QUERIES["i2t"]), []
    shown = {card.query for card in image_cards}
    for card in _cards(of_texts, QUERIES["t2i"]):
        more = shown | {answer.item for answer in card.answers}
        if len(more) > PICTURES:
            break
        shown = more
        text_cards.append(card)
    both = [
        _direction("i2t", of_images, image_cards),
        _direction("t2i", of_texts, text_cards),
    ]
    return both, sorted(shown)


def _cards(answers: Answers, most: int) -> list[Card]:
    """The `most` hardest queries, the hardest first."""
    hardest = answers.rank.argsort(descending=True, stable=True)[:most]
    cards = []
    columns = (tensor[hardest].tolist() for tensor in answers)
    for query, rank, items, *others in zip(hardest.tolist(), *columns, strict=True):
        first = len(items) - 1
        places = [*range(1, first + 1), rank]
        found = list(map(Answer, places, items, *others))
        cards.append(Card(query, rank, found if rank > first else found[:first]))
    return cards


def _direction(way: str, answers: Answers, cards: list[Card]) -> Direction:
    counts = {}
    for name, best in {"all": 0, "wrong at 1": 1, f"wrong at {FIRST}": FIRST}.items():
        on_page = sum(card.rank > best for card in cards)
        of_all = int((answers.rank > best).sum())
        counts[name] = f"{on_page:,}" + (f" of {of_all:,}" if on_page < of_all else "")
    return Direction(way, len(answers.rank), cards, counts)


def _charts(metrics: Metrics, epochs: list[dict[str, float]]) -> list[Chart]:
    """Recall@K and mAP@K against K, a chart a direction; the losses, the mean recall and what is
    left on each set of --retention by epoch, from the rows of a metrics.csv."""
    charts = []
    for way, title in TITLES.items():
        scores = {
            shown: {
                int(name.removeprefix(f"{score}@")): value
                for name, value in metrics[way].items()
                if name.startswith(f"{score}@")
            }
            for score, shown in (("R", "recall"), ("mAP", "mAP"))
        }
        charts.append(draw(f"{title}, percent by K", scores, K_VALUES))
    for title, names in EPOCH_CHARTS.items():
        columns = {
            shown: {row["epoch"]: row[name] for row in epochs if {"epoch", name} <= row.keys()}
            for name, shown in names.items()
        }
        charts.append(draw(f"{title} of the run by epoch", columns))
    by_set: dict[str, dict[float, float]] = {}
    for row in (row for row in epochs if "epoch" in row):
        for name, score in retained(row).items():
            by_set.setdefault(name, {})[row["epoch"]] = score
    for name, curve in by_set.items():
        charts.append(draw(f"{name} (retention) of the run by epoch", {"": curve}))
    return [chart for chart in charts if chart]


def _pictures(dataset: Flickr8kDataset, shown: list[int]) -> dict[int, str]:
    """JPEG in base64 of each of the images, cut as the model sees it."""
    preprocess = replace(dataset.preprocess, side=SIDE)
    pictures = {}
    for image in progress_bar(shown, desc="pictures for the report", unit="img", leave=False):
        pixels = preprocess.resize_and_crop(open_image(dataset.image[image]))
        file = io.BytesIO()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(file, "JPEG", quality=QUALITY, optimize=True)
        pictures[image] = base64.b64encode(file.getvalue()).decode()
    return pictures


def _render(pictures: dict[int, str], **content: object) -> str:
    """The page. All that is filled in is text, also where it looks like HTML; the browser runs no
    script and takes no style but the page's own, by their digests, and loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.tests["chinese"] = CHINESE.search
    style = (here / "report.css").read_text("utf-8") + "".join(
        f'.i{image}{{background-image:url("data:image/jpeg;base64,{data}")}}\n'
        for image, data in pictures.items()
    )
    script = (here / "report.js").read_text("utf-8")
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
        k_values=K_VALUES,
        titles=TITLES,
        **content,
    )


def _printable(value: object) -> str:
    """What is filled in, unless it is HTML, which was made of such pieces."""
    return value if hasattr(value, "__html__") else str(value).translate(CONTROL)


def _digest(text: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
