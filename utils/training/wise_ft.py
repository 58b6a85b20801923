"""Mixtures of the weights before and after fine-tuning (WiSE-FT, Wortsman et al. 2022)."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from models.clip import CLIP
from utils.metric import mean_recall
from utils.retrieval.plots import plot_wise_ft
from utils.retrieval.tables import Metrics, columns
from utils.runs.checkpoint import save_weights, write_csv


def interpolate(start: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float) -> dict:
    """`(1 - alpha) * start + alpha * tuned` (section 3, equation 2); integers as in `tuned`."""
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
    """Score the weights at each of `alphas` between `start` (0) and those of `model` (1).

    `score()` evaluates `model`, which is given each of these weights in turn; afterwards it holds
    those of the last alpha. Writes the curve, `wise_ft.csv` and `wise_ft.png`, and the weights with
    the best mean recall, `weights/wise_ft_weights.pth`, into the folder `run`; prints the curve and
    returns its rows.
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
    plot_wise_ft(rows, run / "wise_ft.png")
    best = max(rows, key=lambda row: row["mean_recall"])
    print("WiSE-FT, mean recall on validation at alpha:", ", ".join(
        f"{row['mean_recall']:.2f} at {row['alpha']:g}" for row in rows))  # fmt: skip
    print(f"the best, alpha {best['alpha']:g}: {run / 'weights' / 'wise_ft_weights.pth'}; "
          f"plot: {run / 'wise_ft.png'}")  # fmt: skip
    return rows
