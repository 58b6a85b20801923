"""What a run prints while it trains: what it trains, and the progress bar of an epoch."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from models.errors import InputError
from models.progress_bar import progress_bar
from utils.flickr8k_dataloader import Batch, Flickr8kDataset, TrainLoader
from utils.metric import mean_recall
from utils.retrieval.tables import Metrics, format_table
from utils.training.state import State


def announce(
    state: State, loader: TrainLoader, val_set: Flickr8kDataset, epochs: int, folder: Path | None
) -> None:
    """Print what is trained, on what, and where results will be; and whether a run has all its
    `epochs` behind it."""
    train_set = loader.dataset
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    learned = sum(p.numel() for p in state.model.parameters() if p.requires_grad) / 1e6
    which = f", of which {learned:.2f} M learn" if learned < millions else ""
    size = loader.processes.size
    processes = f"{size} processes, " if size > 1 else ""
    print(f"{len(train_set)} training images, {len(val_set)} validation images, {processes}"
          f"{loader.device}, {state.precision}, {millions:.1f} M parameters{which}")  # fmt: skip
    texts = len(train_set.text) + len(val_set.text)
    if cut := train_set.count_cut_captions() + val_set.count_cut_captions():
        print(f"{cut} captions ({cut / texts:.2%}) are longer than 77 tokens and were cut")
    if shared := train_set.count_shared_captions() + val_set.count_shared_captions():
        print(f"{shared} captions ({shared / texts:.2%}) belong to several images, and are right "
              "for each of them")  # fmt: skip
    print(f"results in {folder}")
    if len(state.epochs) == epochs:
        print(f"the run has all {epochs} epochs behind it; --epochs with more goes on")


def score_start(state: State, score: Callable[[], tuple[Metrics, float]]) -> None:
    """Score the weights that training starts from, keep the scores in `state` and print them."""
    metrics, val_loss = score()
    state.note_start(metrics, val_loss)
    print(f"before training: validation loss {val_loss:.4f}, mean recall "
          f"{mean_recall(metrics):.2f}\n{format_table(metrics)}")  # fmt: skip


def report_epoch(state: State, epochs: int, metrics: Metrics, images: int, rate: float) -> None:
    """Print the scores of the epoch that has ended, one of `epochs`; after the first, say so if it
    has clearly made the weights worse, and which learning rate to try in place of `rate`.

    Clearly is a fall of mean recall by more than two standard errors of the difference. That of a
    share p of n queries is sqrt(p (1 - p) / n); the mean of several R@K has at most that of their
    mean, and n is the number of validation `images`, since the captions of one are not independent.
    """
    row = state.epochs[-1]
    print(
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, mean recall {row['mean_recall']:.2f}\n{format_table(metrics)}"
    )
    if row["epoch"] > 1 or not state.start:
        return
    before, after = state.start["mean_recall"] / 100, row["mean_recall"] / 100
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / images)
    if before - after > 2 * error:
        lower = rate / 3 if after > before / 2 else rate / 10
        print(
            f"the first epoch made it worse, by more than chance: mean recall {100 * after:.2f}, "
            f"{100 * before:.2f} before training; rather start anew with --lr {lower:.0e}"
        )


def compare_with_start(state: State) -> None:
    """Say so if even the best epoch is worse than the weights that training started from."""
    best = state.best_recall
    if state.start and best < state.start["mean_recall"]:
        print(
            f"training made it worse: mean recall {best:.2f} in the best epoch, "
            f"{state.start['mean_recall']:.2f} before training. Lower --lr, to a tenth at first; "
            "the best point of --wise_ft 0 0.25 0.5 0.75 1 is never worse on validation than the "
            "start"
        )


class Progress:
    """Follows the steps of an epoch, of which `done` were made before this program started. Use it
    as a context manager."""

    def __init__(self, loader: TrainLoader, epoch: int, done: int = 0):
        self.batch_size = loader.batch_size
        self.bar = progress_bar(
            total=len(loader) * loader.batch_size,
            initial=done * loader.batch_size,
            unit="img",
            desc=f"epoch {epoch}",
            disable=not loader.processes.is_first,
        )
        self.steps = 0
        self.seconds_waited = 0.0
        self.started = time.perf_counter()
        self._last: tuple[Tensor, float, int] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, while the time spent waiting for them is measured."""
        asked = time.perf_counter()
        for batch in batches:
            self.seconds_waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def advance(self, loss: Tensor, rate: float, step: int) -> None:
        """Count a step. Its loss is shown with the next one's, so that a GPU has work while the bar
        is drawn. A loss that is not finite raises `InputError` then."""
        self._show_last()
        self._last = loss, rate, step
        self.steps += 1
        self.bar.update(self.batch_size)

    def summary(self, losses: list[Tensor], rate: float) -> dict[str, float]:
        """The mean of the epoch's `losses`, its last learning `rate`, images/s, and the share of
        time spent waiting for data in percent."""
        self._show_last()
        seconds = time.perf_counter() - self.started
        return {
            "train_loss": torch.stack(losses).mean().item(),
            "lr": rate,
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait_percent": 100 * self.seconds_waited / seconds,
        }

    def _show_last(self) -> None:
        if self._last is None:
            return
        loss, rate, step = self._last
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {step}, learning rate {rate:.3g}; lower --lr, raise "
                "--warmup_epochs, or train without --use_amp; earlier weights are kept"
            )
        self.bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2e}", refresh=False)
