"""Mixtures of the weights before and after fine-tuning (WiSE-FT, Wortsman et al. 2022)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from models.clip import CLIP
from models.clip_utils import load
from models.run_files import MIXTURE, MIXTURES
from utils.retrieval.plots import plot_wise_ft
from utils.retrieval.scores import Scores
from utils.runs.checkpoint import save_weights, write_csv


def mix_into(
    model: nn.Module, start: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float
) -> None:
    """Set the weights of `model` to `(1 - alpha) * start + alpha * tuned` (section 3, equation 2);
    integers stay. One tensor at a time, since the model's device may have no room for all."""
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(start[key].lerp(tuned[key], alpha))


def weights_of(file: Path) -> dict[str, Tensor]:
    """The weights in a file, float32."""
    return load(file, "cpu")[0].state_dict()


class Mixtures:
    """Mixtures of the weights `start` (alpha 0) and those of some epochs (1), which `model` takes
    in turn. The chosen one loses at most `max_forgetting` points on sets of --retention, if any
    does."""

    def __init__(self, model: CLIP, start: Mapping[str, Tensor], run: Path, max_forgetting: float):
        self.model = model
        self.start = start
        self.run = run
        self.max_forgetting = max_forgetting
        self.point = {"epoch": 0, "alpha": 0.0}  # that the model is at
        self.rows: list[dict[str, float]] = []

    def each(
        self, epoch: int, tuned: Mapping[str, Tensor], alphas: Sequence[float]
    ) -> Iterator[None]:
        """The model is at each alpha in turn, on the way to `tuned`; the start comes once."""
        for alpha in alphas:
            if alpha == 0 and any(row["alpha"] == 0 for row in self.rows):
                continue
            mix_into(self.model, self.start, tuned, alpha)
            self.point = {"epoch": epoch, "alpha": alpha}
            yield

    def add(self, scores: Scores, val_loss: float, retention: Mapping[str, float]) -> None:
        """Add the present mixture's row to wise_ft.csv; save its weights if they are the best."""
        row = {**self.point, "mean_recall": scores.mean_recall, "val_loss": val_loss}
        self.rows.append({**row, **retention, **scores.columns()})
        if best_row(self.rows, self.max_forgetting) is self.rows[-1]:
            save_weights(self.model, self.run / MIXTURE)
        write_csv(self.run / MIXTURES, self.rows)

    def choose(self) -> Path:
        """Load the best mixture into the model, and print it; plot all scores; return its file."""
        best, chosen = best_row(self.rows, self.max_forgetting), self.run / MIXTURE
        plot = self.run / "wise_ft.png"
        plot_wise_ft(self.rows, best, plot, self.max_forgetting)
        rows = [row | {"chosen": int(row is best)} for row in self.rows]
        write_csv(self.run / MIXTURES, rows)
        self.model.load_state_dict(weights_of(chosen))
        which, limit = "the best", f"at most {self.max_forgetting:g} points (--max_forgetting)"
        if best.get("points_lost", 0.0) > self.max_forgetting:
            which = f"none loses {limit}, the one that loses least"
        elif "points_lost" in best:
            which = f"the best that loses {limit}"
        print(f"WiSE-FT, mixtures with the start: {which}, epoch {best['epoch']} at alpha "
              f"{best['alpha']:g}: {chosen}; all: {MIXTURES}, {plot.name}")  # fmt: skip
        if best["alpha"] == 0:
            print("alpha 0 is the start: it has gained nothing; try a higher --lr or more --epochs")
        return chosen


def best_row(rows: list[dict[str, float]], max_forgetting: float) -> dict[str, float]:
    """The row with the highest mean recall and at most `max_forgetting` points lost; or else with
    the fewest points lost. Of equal rows the first."""
    allowed = [row for row in rows if row.get("points_lost", 0.0) <= max_forgetting]
    if allowed:
        return max(allowed, key=lambda row: row["mean_recall"])
    return min(rows, key=lambda row: row["points_lost"])
