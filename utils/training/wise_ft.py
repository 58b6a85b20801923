"""Mixtures of the weights before and after fine-tuning (WiSE-FT, Wortsman et al. 2022)."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from models.clip import CLIP
from models.clip_utils import load
from utils.retrieval.plots import plot_wise_ft
from utils.retrieval.scores import Scores
from utils.runs.checkpoint import save_weights, write_csv


def mix_into(
    model: nn.Module, start: dict[str, Tensor], tuned: dict[str, Tensor], alpha: float
) -> None:
    """Set the weights of `model` to `(1 - alpha) * start + alpha * tuned` (section 3, equation 2),
    where integers stay as they are. One tensor at a time: `start` and `tuned` may lie on the CPU
    while the model's device has no room for them."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(start[key].lerp(tuned[key], alpha))


def mix_with_start(
    model: CLIP,
    args: argparse.Namespace,
    score: Callable[[], tuple[Scores, float]],
    compare: Callable[[], dict[str, float]],
    tuned: Path,
) -> Path:
    """`evaluate_path` from the starting weights of a run to those of `model`, whose file in the run
    is `tuned`; then `model` holds those that it has chosen, whose file is returned. If the starting
    weights are missing, `tuned`, and a line says so."""
    run, start = tuned.parent.parent, tuned.with_name("start_weights.pth")
    if not start.exists():
        print(f"{start} is missing: no --wise_ft; put it back and run this again")
        return tuned
    weights = load(start, "cpu")[0].state_dict()
    evaluate_path(
        model, weights, args.wise_ft, score, run, compare=compare, most_lost=args.max_forgetting
    )
    chosen = tuned.with_name("wise_ft_weights.pth")
    model.load_state_dict(load(chosen, "cpu")[0].state_dict())
    return chosen


def evaluate_path(
    model: CLIP,
    start: dict[str, Tensor],
    alphas: list[float],
    score: Callable[[], tuple[Scores, float]],
    run: Path,
    compare: Callable[[], dict[str, float]] = dict,
    most_lost: float = math.inf,
) -> list[dict[str, float]]:
    """Score the weights at each of `alphas` between `start` (0, on the CPU) and those of `model`
    (1).

    `score()` evaluates `model`, which is given each of these weights in turn, and `compare()` the
    sets of --retention with it; afterwards it holds those of the last alpha. Writes the curves,
    `wise_ft.csv` and `wise_ft.png`, and the weights that `best_row` chooses,
    `weights/wise_ft_weights.pth`, into the folder `run`; prints the curves and returns their rows.
    """
    tuned = {key: tensor.to("cpu", copy=True) for key, tensor in model.state_dict().items()}
    rows: list[dict[str, float]] = []
    for alpha in alphas:
        mix_into(model, start, tuned, alpha)
        scores, val_loss = score()
        row = {"alpha": alpha, "mean_recall": scores.mean_recall, "val_loss": val_loss}
        rows.append({**row, **compare(), **scores.columns()})
        best = best_row(rows, most_lost)
        if best is rows[-1]:
            save_weights(model, run / "weights" / "wise_ft_weights.pth")
        write_csv(run / "wise_ft.csv", rows)
    plot_wise_ft(rows, best, run / "wise_ft.png", most_lost)
    _print_path(rows, best, run, most_lost)
    return rows


def best_row(rows: list[dict[str, float]], most_lost: float) -> dict[str, float]:
    """The row with the highest mean recall of those with at most so many `points_lost`; where all
    have more, that with the fewest. Of equal ones the first."""
    kept = [row for row in rows if row.get("points_lost", 0.0) <= most_lost]
    if kept:
        return max(kept, key=lambda row: row["mean_recall"])
    return min(rows, key=lambda row: row["points_lost"])


def _print_path(
    rows: list[dict[str, float]], best: dict[str, float], run: Path, most_lost: float
) -> None:
    print("WiSE-FT, mean recall on validation at alpha:", ", ".join(
        f"{row['mean_recall']:.2f} at {row['alpha']:g}" for row in rows))  # fmt: skip
    which = "the best"
    if "points_lost" in best:
        print("points lost on the sets of --retention, on average (below 0: gained):", ", ".join(
            f"{row['points_lost']:.2f} at {row['alpha']:g}" for row in rows))  # fmt: skip
        limit = f"at most {most_lost:g} points (--max_forgetting)"
        which = f"the best that loses {limit}"
        if best["points_lost"] > most_lost:
            print(f"none of them loses {limit}: smaller alphas lose less")
            which = "the one that loses least"
    print(f"{which}, alpha {best['alpha']:g}: {run / 'weights' / 'wise_ft_weights.pth'}; "
          f"plot: {run / 'wise_ft.png'}")  # fmt: skip
    if best["alpha"] == 0:
        print("alpha 0 is the weights that training started from: it has gained nothing")
