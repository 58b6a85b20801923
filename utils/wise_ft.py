"""Weights between the starting and the tuned ones (WiSE-FT, Wortsman et al. 2022)."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.clip import CLIP
from utils.checkpoint import save_weights, write_csv
from utils.files import save_figure
from utils.metric import TITLES, Metrics, columns, mean_recall


def interpolate(start: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> dict:
    """`(1 - alpha) * start + alpha * tuned` (section 3, equation 2); counters as in `tuned`."""
    return {
        key: start[key].lerp(tensor, alpha) if tensor.is_floating_point() else tensor
        for key, tensor in tuned.items()
    }


def evaluate_path(
    model: CLIP,
    start: dict[str, Tensor],
    alphas: list[float],
    score: Callable[[], tuple[Metrics, float]],
    run: Path,
) -> list[dict[str, float]]:
    """Score the weights at each of `alphas` from `start` to those of `model`, which `score` scores
    and which ends as the last of them.

    Writes the curve, `wise_ft.csv` and `wise_ft.png`, and the weights with the best mean recall,
    `weights/wise_ft_weights.pth`, into the run's folder. Returns the rows of the curve.
    """
    tuned = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    start = {key: start[key].to(tensor) for key, tensor in tuned.items()}
    rows = []
    for alpha in alphas:
        model.load_state_dict(interpolate(start, tuned, alpha))
        metrics, val_loss = score()
        row = {"alpha": alpha, "mean_recall": mean_recall(metrics), "val_loss": val_loss}
        if all(row["mean_recall"] > other["mean_recall"] for other in rows):  # the first is, too
            save_weights(model, run / "weights" / "wise_ft_weights.pth")
        rows.append(row | columns(metrics))
        write_csv(run / "wise_ft.csv", rows)
    plot_path(rows, run / "wise_ft.png")
    return rows


def plot_path(rows: list[dict[str, float]], path: Path) -> None:
    """Mean recall, and R@1 in both directions, against alpha, as a picture at `path`."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["alpha"])
    best = max(rows, key=lambda row: row["mean_recall"])
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    alphas = [row["alpha"] for row in rows]
    curves = {"mean recall": "mean_recall"} | {
        f"R@1, {t}": f"{way}_R@1" for way, t in TITLES.items()
    }
    for label, name in curves.items():
        axes.plot(alphas, [row[name] for row in rows], "o-", label=label)
    axes.plot(best["alpha"], best["mean_recall"], "k*", markersize=14, label="best", zorder=3)
    axes.set(xlabel="alpha (0: the starting weights, 1: the tuned ones)", ylabel="percent")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
