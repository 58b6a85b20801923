"""The guard: a run that falls clearly below its start goes back to it."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from models.clip_utils import load
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.bootstrap import interval, resample
from utils.retrieval.evaluation import Evaluator
from utils.retrieval.scores import Scores
from utils.training.layer_groups import train_mode
from utils.training.optimizer import RESTART_FACTOR
from utils.training.state import State

EARLY_EPOCHS = 2
EARLY_STEPS = 50  # at least, between two comparisons within an epoch
EARLY_IMAGES = 500  # at most


class Guard:
    """Compares the mean recall on validation with that of the starting weights: after each epoch,
    and within the first ones every quarter of an epoch on a subset. If the 95% interval of paired
    bootstrap samples is below zero, the run goes on from the starting weights, with a third of the
    rate, a new optimizer and a new warm-up. Without `note_start` it does nothing."""

    def __init__(
        self,
        evaluator: Evaluator,
        val_set: Flickr8kDataset,
        start: Path,
        cached: Mapping[str, Tensor],
    ):
        self.evaluator = evaluator
        self.start = start  # file of the starting weights
        self.every = max(EARLY_STEPS, len(evaluator.loader) // 4)  # steps
        self.val_set = val_set
        self.cached = cached

    @cached_property
    def early(self) -> tuple[Flickr8kDataset, dict[str, Tensor]]:
        """The subset and its cached features."""
        images = range(0, len(self.val_set), -(-len(self.val_set) // EARLY_IMAGES))
        captions = [caption for image in images for caption in self.val_set.own_captions[image]]
        rows = {"image": list(images), "text": captions}
        cached = {tower: features[rows[tower]] for tower, features in self.cached.items()}
        return self.val_set.subset(images), cached

    def note_start(self, state: State, scores: Scores) -> None:
        """Keep the recall of the starting weights, whose scores on validation these are."""
        state.baseline = {"val": _recall(scores, self.val_set)}
        if self.every < len(self.evaluator.loader):
            state.baseline["early"] = self._early_recall(state)

    def after_epoch(self, state: State, scores: Scores) -> None:
        """Compare the scores of an epoch; the run goes back before its next step."""
        if state.baseline:
            self._compare(state, "val", _recall(scores, self.val_set))

    def before_step(self, state: State, step: int) -> None:
        """Go back to the start if that is due before this step of the run; compare if it is due."""
        done = len(state.losses)
        is_due = done and done % self.every == 0 and len(state.epochs) < EARLY_EPOCHS
        # A loss that is not finite ends the run in this step.
        if is_due and "early" in state.baseline and state.losses[-1].isfinite():
            self._compare(state, "early", self._early_recall(state))
            train_mode(state.model)
        if state.lost:
            self._go_back(state, step)

    def _early_recall(self, state: State) -> list[float]:
        subset, cached = self.early
        scores, _ = self.evaluator.score(state.scored, subset, cached=cached)
        return _recall(scores, subset)

    def _compare(self, state: State, name: str, recall: list[float]) -> None:
        gained = interval(np.subtract(recall, state.baseline[name]))
        low, high = self.evaluator.processes.broadcast(gained)
        state.lost = [-high, -low] if high < 0 else []

    def _go_back(self, state: State, step: int) -> None:
        least, most = state.lost
        tqdm.write(
            f"mean recall on validation is {least:.2f} to {most:.2f} points below the start (95% "
            f"interval): back to the starting weights, with 1/{RESTART_FACTOR} of the rate"
        )
        state.restart(load(self.start, "cpu")[0].state_dict(), step)


def _recall(scores: Scores, dataset: Flickr8kDataset) -> list[float]:
    return resample(scores, dataset)["mean_recall"].tolist()
