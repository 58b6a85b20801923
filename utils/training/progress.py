"""What a run prints: what it trains, the progress bar of an epoch, the scores."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from models.clip import CLIP
from models.device import download
from models.errors import InputError
from models.progress_bar import progress_bar
from utils.data.annotations import SPLITS
from utils.flickr8k_dataloader import ALIKE, Batch, Flickr8kDataset, TrainLoader
from utils.machine.memory import peak_memory_mb, reset_peak_memory
from utils.retrieval.evaluation import Evaluator
from utils.retrieval.plots import plot_scores
from utils.retrieval.report import write_report
from utils.retrieval.scores import Scores, score_features
from utils.retrieval.tables import format_table, points_lost, retained
from utils.runs.checkpoint import write_json
from utils.training.state import State

# Share of tokens that are parts of words. In Flickr8k: CLIP's tokenizer 2% of English and 90% of
# Chinese captions; BERT's Chinese one 33% of English and 0% of Chinese, 22% of both together.
MANY_FRAGMENTS = 0.25


def announce(
    state: State,
    loader: TrainLoader,
    sets: dict[str, Flickr8kDataset],
    epochs: int,
    folder: Path | None,
) -> None:
    """Print what is trained, on what data, and the run's folder, with warnings and hints."""
    count = sum(p.numel() for p in state.model.parameters())
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    which = f", of which {trainable / 1e6:.2f} M learn" if trainable < count else ""
    size = loader.processes.size
    processes = f"{size} processes, " if size > 1 else ""
    images = ", ".join(f"{len(dataset)} {SPLITS[split]} images" for split, dataset in sets.items())
    print(f"{images}, {processes}{loader.device}, {state.precision}, "
          f"{count / 1e6:.1f} M parameters{which}")  # fmt: skip
    is_chinese = state.model.text_tower.language == "Chinese"
    for line in caption_warnings(sets["train"], sets["val"], is_chinese):
        print(line)
    print(f"results in {folder}")
    if len(state.epochs) == epochs:
        print(f"this run is finished, with all {epochs} epochs behind it: nothing is trained; more "
              "--epochs go on with it")  # fmt: skip
    elif state.precision.leaves_bfloat16:
        print("hint: this CPU has instructions for bfloat16: --use_amp trains faster with them")


def caption_warnings(
    train_set: Flickr8kDataset, val_set: Flickr8kDataset, is_chinese: bool
) -> Iterator[str]:
    """Lines on captions that are cut, alike, in another language, or shared."""
    texts = len(train_set.text) + len(val_set.text)
    if cut := train_set.count_cut_captions() + val_set.count_cut_captions():
        yield (f"{cut} captions ({cut / texts:.2%}) are longer than the "
               f"{train_set.context_length} tokens that the model reads, and were cut")  # fmt: skip
    if alike := train_set.count_alike_captions() + val_set.count_alike_captions():
        yield f"warning: {alike} captions are different texts, but {ALIKE}"
    if warning := tokenizer_warning(train_set, is_chinese):
        yield warning
    if shared := train_set.count_shared_captions() + val_set.count_shared_captions():
        yield (f"{shared} captions ({shared / texts:.2%}) belong to several images, and are "
               "positives of each of them")  # fmt: skip


def tokenizer_warning(dataset: Flickr8kDataset, is_chinese: bool) -> str | None:
    """A warning if the tokenizer, for Chinese or for English, breaks many words, or None."""
    share = dataset.share_of_fragments()
    if share < MANY_FRAGMENTS:
        return None
    made_for, other, instead = (
        ("Chinese", "English", "ViT-B/32, from scratch ViT-demo")
        if is_chinese
        else ("English", "Chinese", "OFA-Sys/chinese-clip-vit-base-patch16, from scratch cn-demo")
    )
    return (
        f"warning: the model's tokenizer was made for {made_for}, and of these captions "
        f"{share:.0%} of the tokens are parts of words or unknown; for {other} captions take a "
        f"model such as {instead}"
    )


def report_start(state: State, scores: Scores) -> None:
    """Print the scores of the weights that training starts from."""
    print(f"before training: validation loss {state.start['val_loss']:.4f}, mean recall "
          f"{state.start['mean_recall']:.2f}\n{format_table(scores, 'val')}")  # fmt: skip
    if sets := retained(state.start):
        print("retention:", ", ".join(f"{name} {score:.2f}" for name, score in sets.items()))


def report_epoch(state: State, epochs: int, scores: Scores) -> None:
    """Print the scores of the last epoch, of `epochs` in all."""
    row, table = state.epochs[-1], format_table(scores, "val")
    print(
        f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, mean recall {row['mean_recall']:.2f}\n{table}"
    )
    if sets := retained(row):
        was = retained(state.start)
        print("retention:", ", ".join(
            f"{name} {score:.2f} ({was[name]:.2f} before training)"
            for name, score in sets.items()), end="; ")  # fmt: skip
        lost = points_lost(row, state.start)
        print(f"points {'gained' if lost < 0 else 'lost'}, on average: {abs(lost):.2f}")


def report_chosen(
    evaluator: Evaluator, model: CLIP, weights: Path, val_set: Flickr8kDataset
) -> None:
    """Score a run's chosen `weights`, which `model` has; print the scores, and write a plot and a
    page into the run's folder."""
    features = evaluator.encode(model, val_set)
    scores = score_features(*features, val_set.img_to_txt, val_set.txt_to_img, range(1, 11))
    folder = weights.parent.parent
    plot, report = folder / "R_mAP.png", folder / "report.html"
    print(f"{weights.name}:\n{format_table(scores, 'val')}")
    plot_scores(scores, plot)
    write_report(report, weights, val_set, features, scores)
    print(f"plot: {plot}\nreport, with the answers to every query, for a browser: {report}")


def report_test(scores: Scores, weights: Path) -> None:
    """Print the test scores of the chosen `weights`, and write them to test_metrics.json."""
    file = weights.parent.parent / "test_metrics.json"
    write_json(file, scores.as_dict())
    print(f"{weights.name} on the test images, which had no say in choosing it:\n"
          f"{format_table(scores, 'test')}\nscores: {file}")  # fmt: skip


class Progress(AbstractContextManager):
    """The progress bar, speed, peak memory and losses of an epoch, of which `done` steps were made
    by an earlier program."""

    def __init__(self, loader: TrainLoader, epoch: int, done: int = 0):
        self.device = loader.device
        reset_peak_memory(self.device)
        self.batch_size = loader.batch_size
        self.bar = progress_bar(
            total=len(loader) * loader.batch_size,
            initial=done * loader.batch_size,
            unit="img",
            desc=f"epoch {epoch}",
            disable=not loader.processes.is_rank_0,
        )
        self.steps = 0
        self.seconds_waited = 0.0
        self.started = time.perf_counter()
        self._last: tuple[Callable[[], float], float, int] | None = None

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; measures the time spent waiting for them."""
        asked = time.perf_counter()
        for batch in batches:
            self.seconds_waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def advance(self, loss: Tensor, rate: float, step: int) -> None:
        """Count a step. Its loss is read one step later, so that the CPU does not wait for the GPU;
        a loss that is not finite raises `InputError` then."""
        self._show_last()
        self._last = download(loss), rate, step
        self.steps += 1
        self.bar.update(self.batch_size)

    def summary(self, losses: list[Tensor], rate: float) -> dict[str, float]:
        """Columns of a table: the mean of the `losses`, the `rate`, the speed, the waiting, the
        peak memory."""
        self._show_last()
        seconds = time.perf_counter() - self.started
        return {
            "train_loss": torch.stack(losses).mean().item(),
            "lr": rate,
            "images_per_second": self.steps * self.batch_size / seconds,
            "data_wait_percent": 100 * self.seconds_waited / seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def _show_last(self) -> None:
        if self._last is None:
            return
        loss, rate, step = self._last
        value = loss()
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} at step {step}, learning rate {rate:.3g}; lower --lr, raise "
                "--warmup_epochs, or train without --use_amp; earlier weights are kept"
            )
        self.bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2e}", refresh=False)
