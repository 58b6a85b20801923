"""Retrieval scores in words: their names, a table to print, the fields of a CSV row."""

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
    lines = [f"{SPLITS[split]:13}" + "".join(f"{name.replace('_', ' '):>13}" for name in names)]
    for direction, title in TITLES.items():
        lines.append(title + "".join(f"{metrics[direction][name]:13.2f}" for name in names))
    return "\n".join(lines)
