"""Scores in words: their names, tables to print, the fields of a CSV row."""

from collections.abc import Iterable

from utils.data.annotations import SPLITS

K_VALUES = (1, 5, 10)
TITLES = {"i2t": "image to text", "t2i": "text to image"}
Metrics = dict[str, dict[str, float]]


def columns(metrics: Metrics) -> dict[str, float]:
    """The metrics as fields of one row of a table, `i2t_R@1` and so on."""
    return {f"{way}_{name}": value for way in metrics for name, value in metrics[way].items()}


def format_table(metrics: Metrics, split: str, k_values: Iterable[int] = K_VALUES) -> str:
    """The metrics as lines of text, a line a direction, under the name of the split ("val", "test")
    that they are of."""
    names = [f"{score}@{k}" for score in ("R", "mAP") for k in k_values]
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
