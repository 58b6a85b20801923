"""Retrieval scores shown: as a table, as fields of a CSV row, as a plot."""

from collections.abc import Iterable
from pathlib import Path

from utils.runs.files import save_figure

K_VALUES = (1, 5, 10)
TITLES = {"i2t": "image to text", "t2i": "text to image"}
Metrics = dict[str, dict[str, float]]


def columns(metrics: Metrics) -> dict[str, float]:
    """The metrics as fields of one row of a table, `i2t_R@1` and so on."""
    return {f"{way}_{name}": value for way in metrics for name, value in metrics[way].items()}


def format_table(metrics: Metrics, k_values: Iterable[int] = K_VALUES) -> str:
    """The metrics as lines of text, a line a direction."""
    names = [f"{score}@{k}" for score in ("R", "mAP") for k in k_values]
    names += ["median_rank", "mean_rank"]
    lines = [" " * 13 + "".join(f"{name.replace('_', ' '):>13}" for name in names)]
    for direction, title in TITLES.items():
        lines.append(title + "".join(f"{metrics[direction][name]:13.2f}" for name in names))
    return "\n".join(lines)


def plot_metrics(metrics: Metrics, path: Path) -> None:
    """Recall@K and mAP@K against K from 1 to 10, one panel a direction, as a picture at `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    top = 0.0
    for panel, (direction, title) in zip(panels, TITLES.items(), strict=True):
        for score, style, above in (("R", "o-", 6), ("mAP", "s--", -14)):
            points = {
                int(name.split("@")[1]): value
                for name, value in metrics[direction].items()
                if name.startswith(f"{score}@")
            }
            top = max(top, *points.values())
            label = "Recall@K" if score == "R" else "mAP@K"
            (line,) = panel.plot(list(points), list(points.values()), style, label=label)
            for k in K_VALUES:
                panel.annotate(f"{points[k]:.1f}", (k, points[k]), (0, above), ha="center",
                               textcoords="offset points", color=line.get_color())  # fmt: skip
        panel.set(title=title.capitalize(), xlabel="K", xticks=list(points), xlim=(0.5, 10.5))
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right" if points[1] > top / 2 else "upper left")
    panels[0].set(ylabel="percent", ylim=(0, min(1.15 * top, 108)))
    save_figure(figure, path)
