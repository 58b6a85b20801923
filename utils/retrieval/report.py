"""The report: one HTML page with scores, curves and the first answers to each query."""

import base64
import io
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import regex
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from models import run_files
from models.files import read_json
from models.progress_bar import progress_bar
from utils.data.annotations import SPLITS
from utils.data.image_batches import read_image
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.encode import Features
from utils.retrieval.plots import chart_svg
from utils.retrieval.ranking import Answers, both_ways, first_answers
from utils.retrieval.scores import TITLES, Scores
from utils.retrieval.tables import RETENTION, retained, score_table
from utils.runs.checkpoint import read_csv
from utils.runs.files import atomic_write, writing

FIRST = 5  # answers shown to a query
# The most that a page holds, so that it stays below 15 MB and opens at once.
QUERIES = {"i2t": 1000, "t2i": 5000}
PICTURES = 2000
SIDE, QUALITY = 128, 60  # of a picture, in pixels and of JPEG
EPOCH_CHARTS = {
    "loss": {"train_loss": "training", "val_loss": "validation"},
    "mean recall": {"mean_recall": ""},
}
CHINESE = regex.compile(r"\p{Han}")


def write_report(
    path: Path, weights: str | Path, dataset: Flickr8kDataset, features: Features, scores: Scores
) -> None:
    """Write one HTML file, which loads no other file, about `weights` on `dataset`: the `scores` (K
    from 1 to 10), the arguments and epochs of the weights' run, and the first answers to the
    queries, hardest first. Raises `InputError` for an unreadable image or an unwritable file."""
    run = run_files.run_folder(weights)
    metrics = run and run / run_files.METRICS
    epochs = read_csv(metrics) if metrics and metrics.exists() else []
    arguments = read_json(run / run_files.ARGUMENTS) if run else {}
    epoch, of_epoch = _epoch(Path(weights), run, epochs) if epochs else (None, "")
    directions, shown = _directions(dataset, features)
    page = _render(
        weights=weights,
        model=_model(weights, arguments),
        epoch=epoch,
        of_epoch=of_epoch,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        dataset=dataset,
        split=SPLITS[dataset.split],
        table=score_table(scores),
        mean_recall=scores.mean_recall,
        test_scores=_test_scores(run) if run else {},
        charts=_curves(scores, epochs),
        arguments=arguments,
        directions=directions,
        first_captions=[dataset.text[own[0]] for own in dataset.own_captions.values()],
        names=dataset.names,
        pictures=_pictures(dataset, shown),
    )
    with writing(path), atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "backslashreplace"))  # for lone surrogates


def _model(weights: str | Path, arguments: dict[str, object]) -> str:
    """The model, and what its run started from."""
    start = arguments.get("resume_training")
    if start == "none":
        return f"{arguments.get('model')}, trained from scratch"
    return f"fine-tuned from {start}" if start else str(weights)


def _epoch(weights: Path, run: Path, epochs: list[dict[str, float]]) -> tuple[float | None, str]:
    """The epoch that a run's weights are of, if their name tells, and words for it."""
    mixtures = run / run_files.MIXTURES
    if weights.name == Path(run_files.MIXTURE).name and mixtures.exists():
        chosen = next(row for row in read_csv(mixtures) if row["chosen"])
        if chosen["alpha"] == 0:
            return 0, "0, the weights before training"
        mixed = f"mixed with the start, alpha {chosen['alpha']:g}"
        return chosen["epoch"], f"{chosen['epoch']:g}, {mixed}"
    best = max(epochs, key=lambda row: row["mean_recall"] if row["epoch"] else 0)["epoch"]
    last = epochs[-1]["epoch"]
    of_file = {Path(run_files.BEST).name: best, Path(run_files.LAST).name: last}
    epoch = of_file.get(weights.name)
    return epoch, "" if epoch is None else f"{epoch:g} of {last:g}"


def _test_scores(run: Path) -> dict[str, list[tuple[str, str]]]:
    """Mean recall and R@1 on the test split before and after training, with intervals, if any."""
    content = read_json(run / run_files.TEST_METRICS) or {}
    found = {}
    for name, scores in {"before": content.get("before"), "after": content}.items():
        if scores:
            row = {"mean_recall": scores["mean_recall"]}
            row |= {f"{way}_R@1": scores[way]["R@1"] for way in TITLES}
            ends = content["intervals"][name]
            found[f"{name} training"] = [
                (f"{score:.2f}", "{:.1f} to {:.1f}".format(*ends[r])) for r, score in row.items()
            ]
    return found


class Answer(NamedTuple):
    rank: int
    item: int  # index of the image or the caption
    similarity: float
    is_positive: bool


class Card(NamedTuple):
    """A query, the rank of its best-ranked positive, and its first answers; that positive comes
    last if it is not among them."""

    query: int
    rank: int
    answers: list[Answer]


class Direction(NamedTuple):
    way: str
    ranks: list[int]  # of all queries
    cards: list[Card]  # the hardest queries, which the page shows


def _directions(dataset: Flickr8kDataset, features: Features) -> tuple[list[Direction], list[int]]:
    """Both directions, and the indices of the images that they show."""
    i2t, t2i = both_ways(*features)
    of_images = first_answers(i2t, dataset.img_to_txt, FIRST)
    of_texts = first_answers(t2i, dataset.txt_to_img, FIRST)
    image_cards, text_cards = _cards(of_images, QUERIES["i2t"]), []
    shown = {card.query for card in image_cards}
    for card in _cards(of_texts, QUERIES["t2i"]):
        more = shown | {answer.item for answer in card.answers}
        if len(more) > PICTURES:
            break
        shown = more
        text_cards.append(card)
    of_image = Direction("i2t", of_images.rank.tolist(), image_cards)
    of_text = Direction("t2i", of_texts.rank.tolist(), text_cards)
    return [of_image, of_text], sorted(shown)


def _cards(answers: Answers, most: int) -> list[Card]:
    """The `most` hardest queries, the hardest first."""
    hardest = answers.rank.argsort(descending=True, stable=True)[:most]
    cards = []
    columns = (tensor[hardest].tolist() for tensor in answers)
    for query, rank, items, *others in zip(hardest.tolist(), *columns, strict=True):
        first = len(items) - 1
        found = list(map(Answer, [*range(1, first + 1), rank], items, *others))
        cards.append(Card(query, rank, found if rank > first else found[:first]))
    return cards


def _curves(
    scores: Scores, epochs: list[dict[str, float]]
) -> dict[str, dict[str, dict[float, float]]]:
    """The curves of each chart, {title: {name: {x: y}}}: recall and mAP at K, a chart a direction;
    and by epoch, from a metrics.csv, losses, mean recall and the sets of --retention."""
    charts = {
        f"{title}, percent by K": {"recall": way.recall, "mAP": way.map_at}
        for title, way in scores.by_title().items()
    }
    sets = dict.fromkeys(name for row in epochs for name in retained(row))
    by_epoch = EPOCH_CHARTS | {f"{name} (retention)": {RETENTION + name: ""} for name in sets}
    for title, columns in by_epoch.items():
        curves = {
            name: {row["epoch"]: row[column] for row in epochs if column in row}
            for column, name in columns.items()
        }
        charts[f"{title} of the run by epoch"] = {n: curve for n, curve in curves.items() if curve}
    return {title: curves for title, curves in charts.items() if curves}


def _pictures(dataset: Flickr8kDataset, shown: list[int]) -> dict[int, str]:
    """JPEG in base64 of each of the images, cropped as the model sees it."""
    preprocess = replace(dataset.preprocess, side=SIDE)
    pictures = {}
    for image in progress_bar(shown, desc="pictures for the report", unit="img"):
        pixels = preprocess.resize_and_crop(read_image(dataset.image[image]))
        file = io.BytesIO()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(file, "JPEG", quality=QUALITY, optimize=True)
        pictures[image] = _base64(file.getvalue())
    return pictures


def _render(pictures: dict[int, str], **content: object) -> str:
    """The page. All content is escaped."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["chinese"] = CHINESE.search
    environment.filters["svg"] = lambda curves, chosen: _base64(chart_svg(curves, chosen))
    style = (here / "report.css").read_text("utf-8") + "".join(
        f'.i{image}{{background-image:url("data:image/jpeg;base64,{data}")}}\n'
        for image, data in pictures.items()
    )
    return environment.get_template("report.html.j2").render(
        style=Markup(style),
        script=Markup((here / "report.js").read_text("utf-8")),
        titles=TITLES,
        filters={"all": 0, "wrong at 1": 1, f"wrong at {FIRST}": FIRST},
        **content,
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
