"""Scores in words: their names, tables to print, the fields of a CSV row."""

from collections.abc import Mapping

from utils.data.annotations import SPLITS

K_VALUES = (1, 5, 10)
TITLES = {"i2t": "image to text", "t2i": "text to image"}
RETENTION = "retention_"  # begins the column of a set of --retention; the set's name follows
Metrics = dict[str, dict[str, float]]


def columns(metrics: Metrics) -> dict[str, float]:
    """The metrics as fields of one row of a table, `i2t_R@1` and so on."""
    return {f"{way}_{name}": value for way in metrics for name, value in metrics[way].items()}


def retained(row: Mapping[str, float]) -> dict[str, float]:
    """{name: score} of the sets of --retention in a row of a table."""
    return {c.removeprefix(RETENTION): s for c, s in row.items() if c.startswith(RETENTION)}


def points_lost(now: Mapping[str, float], before: Mapping[str, float]) -> float:
    """How many points of percent lower the sets of --retention score in the row `now` than in that
    `before`, their mean; rounded, so that 60.1 - 58.1 is no more than 2."""
    was = retained(before)
    lost = [was[name] - score for name, score in retained(now).items()]
    return round(sum(lost) / len(lost), 6)


def format_table(metrics: Metrics, split: str) -> str:
    """The metrics as lines of text, a line a direction, under the name of the split ("val", "test")
    that they are of."""
    names = [f"{score}@{k}" for score in ("R", "mAP") for k in K_VALUES]
    names += ["median_rank", "mean_rank"]
    rows = {title: [metrics[way][name] for name in names] for way, title in TITLES.items()}
    return format_rows([name.replace("_", " ") for name in names], rows, SPLITS[split])


def format_rows(names: list[str], rows: dict[str, list[float]], corner: str = "") -> str:
    """A table of the scores with these `names`, a line for each title in `rows`; the text `corner`
    stands above the titles."""
    first = max(map(len, [corner, *rows]))
    widths = [max(13, len(name) + 2) for name in names]
    lines = [corner.ljust(first) + "".join(map(str.rjust, names, widths))]
    for title, scores in rows.items():
        fields = (f"{score:{width}.2f}" for score, width in zip(scores, widths, strict=True))
        lines.append(title.ljust(first) + "".join(fields))
    return "\n".join(lines)
