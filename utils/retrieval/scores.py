"""Retrieval scores: recall at K, mAP at K and ranks, images to texts and texts to images."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from utils.retrieval.ranking import Positives, Similarities, both_ways, positive_ranks

K_VALUES = (1, 5, 10)
TITLES = {"i2t": "image to text", "t2i": "text to image"}
# The scores that are shown before and after training, {title: column}.
MAIN = {"mean recall": "mean_recall"} | {f"R@1 {TITLES[way]}": f"{way}_R@1" for way in TITLES}


@dataclass(frozen=True)
class DirectionScores:
    """Scores of one direction; `compute_metrics` defines them."""

    recall: dict[int, float]  # {K: percent}
    map_at: dict[int, float]  # {K: percent}
    median_rank: float  # of the best-ranked positive, from 1
    mean_rank: float
    ranks: Tensor = field(repr=False, compare=False)  # the same of each query, `[queries]`

    def named(self, k_values: Iterable[int] | None = None) -> dict[str, float]:
        """All scores by name, `R@1` and so on; with `k_values` for these K alone."""
        k_values = tuple(self.recall if k_values is None else k_values)
        return {
            **{f"R@{k}": self.recall[k] for k in k_values},
            **{f"mAP@{k}": self.map_at[k] for k in k_values},
            "median_rank": self.median_rank,
            "mean_rank": self.mean_rank,
        }


@dataclass(frozen=True)
class Scores:
    """Scores of both directions."""

    i2t: DirectionScores
    t2i: DirectionScores

    @property
    def mean_recall(self) -> float:
        """The mean of R@1, R@5 and R@10 in both directions; it decides which epoch is best."""
        return float(np.mean([way.recall[k] for way in (self.i2t, self.t2i) for k in K_VALUES]))

    def by_title(self) -> dict[str, DirectionScores]:
        return {title: getattr(self, way) for way, title in TITLES.items()}

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {"i2t": self.i2t.named(), "t2i": self.t2i.named()}

    def for_json(self) -> dict[str, dict[str, float] | float]:
        """What JSON files hold: `as_dict` and the mean recall."""
        return {"mean_recall": self.mean_recall, **self.as_dict()}

    def columns(self) -> dict[str, float]:
        """The fields of a row of a CSV: `mean_recall`, `i2t_R@1` and so on."""
        both = self.as_dict()
        by_name = {f"{way}_{name}": value for way in both for name, value in both[way].items()}
        return {"mean_recall": self.mean_recall, **by_name}


def score_features(
    image_features: Tensor,
    text_features: Tensor,
    img2txt: Positives,
    txt2img: Positives,
    k_values: Iterable[int] = K_VALUES,
) -> Scores:
    """Scores from normalised features `[images, d]` and `[texts, d]`."""
    k_values = tuple(k_values)
    i2t, t2i = both_ways(image_features, text_features)
    return Scores(score_direction(i2t, img2txt, k_values), score_direction(t2i, txt2img, k_values))


def score_direction(
    similarities: Similarities, positives: Positives, k_values: Iterable[int]
) -> DirectionScores:
    """Scores of one direction, from all its similarities."""
    ranks = torch.cat([positive_ranks(*block) for block in similarities.blocks(positives)])
    best, is_positive = ranks[:, 0], ranks.isfinite()
    precision = is_positive.cumsum(dim=1) / ranks
    recall, map_at = {}, {}
    for k in k_values:
        recall[k] = 100 * (best <= k).double().mean().item()
        gained = (precision * (ranks <= k)).sum(dim=1)
        map_at[k] = 100 * (gained / is_positive.sum(dim=1).clamp(max=k)).mean().item()
    return DirectionScores(recall, map_at, float(np.median(best)), best.mean().item(), best)
