"""What a run prints: what it trains, the progress bar of an epoch, the scores."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
from torch import Tensor

from models.device import download
from models.errors import InputError
from models.progress_bar import progress_bar
from utils.data.annotations import SPLITS
from utils.flickr8k_dataloader import ALIKE, Batch, Flickr8kDataset, TrainLoader
from utils.machine.memory import peak_memory_mb
from utils.retrieval.tables import retained
from utils.runs.folder import Run
from utils.training.state import State

# Share of tokens that are parts of words. In Flickr8k: CLIP's tokenizer 2% of English and 90% of
# Chinese captions; BERT's Chinese one 33% of English and 0% of Chinese, 22% of both together.
MANY_FRAGMENTS = 0.25


def announce(
    run: Run, state: State, loader: TrainLoader, sets: dict[str, Flickr8kDataset], epochs: int
) -> None:
    """Print the data, the model and the folder of the run, with warnings and hints, on rank 0."""
    if not loader.processes.is_rank_0:
        return
    start, data = run.arguments["resume_training"], run.arguments["dataset_path"]
    name = f"{run.arguments['model']} from scratch" if start == "none" else start
    count = sum(p.numel() for p in state.model.parameters())
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    which = f", of which {trainable / 1e6:.2f} M learn" if trainable < count else ""
    size = loader.processes.size
    processes = f"{size} processes, " if size > 1 else ""
    images = ", ".join(f"{len(dataset)} {SPLITS[split]} images" for split, dataset in sets.items())
    print(f"data: {images}, {data}")
    scored, of = run.arguments["val_images"], len(sets["val"])
    if scored < of:
        print(f"scored after each epoch: {scored:,} of {of:,} validation images (--val_images)")
    print(f"model: {name}, {count / 1e6:.1f} M parameters{which}; {processes}{loader.device}, "
          f"{state.precision}")  # fmt: skip
    captioned = [sets[split] for split in ("train", "val") if sets[split].tokens]
    print(*caption_warnings(*captioned), f"results in {run.folder}", sep="\n")
    if len(state.epochs) == epochs:
        print(f"this run is finished, all {epochs} epochs: nothing is trained; to go on, raise "
              "--epochs")  # fmt: skip
    elif state.precision.leaves_bfloat16:
        print("hint: this CPU has instructions for bfloat16: --use_amp trains faster with them")


def caption_warnings(*sets: Flickr8kDataset) -> Iterator[str]:
    """Lines on captions that are cut, alike, in another language, or shared."""
    texts = sum(len(dataset.text) for dataset in sets)
    if cut := sum(dataset.count_cut_captions() for dataset in sets):
        yield (f"{cut} captions ({cut / texts:.2%}) are longer than the "
               f"{sets[0].context_length} tokens that the model reads, and were cut")  # fmt: skip
    if alike := sum(dataset.count_alike_captions() for dataset in sets):
        yield f"warning: {alike} captions are different texts, but {ALIKE}"
    if warning := tokenizer_warning(sets[0]):
        yield warning
    if shared := sum(dataset.count_shared_captions() for dataset in sets):
        yield f"{shared} captions ({shared / texts:.2%}) belong to several images: positives of all"


def tokenizer_warning(dataset: Flickr8kDataset) -> str | None:
    """A warning if the tokenizer breaks many words, or None."""
    share = dataset.share_of_fragments()
    if share < MANY_FRAGMENTS:
        return None
    return (
        f"warning: {share:.0%} of the captions' tokens are parts of words or unknown: take a model "
        "whose tokenizer has their language, for Chinese OFA-Sys/chinese-clip-vit-base-patch16 "
        "(from scratch cn-demo), for English ViT-B/32 (from scratch ViT-demo)"
    )


def epochs_left(state: State, epochs: int, patience: int | None) -> Iterator[int]:
    """The epochs still to train, until the best mean recall is `patience` epochs old."""
    for epoch in range(len(state.epochs) + 1, epochs + 1):
        if patience and state.epochs and epoch > state.best_epoch + patience:
            print(f"no better mean recall in {patience} epochs (--patience): training ends")
            return
        yield epoch


def _duration(seconds: float) -> str:
    """As 01:30, or 2:01:30."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


class EpochTable:
    """The table that a run of `epochs` epochs with `steps` steps each prints, a line an epoch."""

    def __init__(self, state: State, epochs: int, steps: int):
        self.state = state
        self.epochs = epochs
        self.trained = -len(state.losses) / steps  # epochs, without what others did
        self.has_header = False
        self.started = self.last = time.perf_counter()

    def add_start(self) -> None:
        """Print the line of the weights that training starts from."""
        self._print(self.state.start, "start")
        self.started = self.last = time.perf_counter()

    def add_epoch(self) -> None:
        """Print the line of the last epoch."""
        row, now = self.state.epochs[-1], time.perf_counter()
        epoch = row["epoch"]
        self.trained += 1
        left = ""  # after an epoch of which only the scores were missing
        if self.trained:
            left = _duration((now - self.started) / self.trained * (self.epochs - epoch))
        mark = "*" if self.state.best_epoch == epoch else ""
        self._print(row, f"{epoch}/{self.epochs}", _duration(now - self.last), left, mark)
        self.last = now

    def _print(
        self, row: Mapping[str, float], epoch: str, spent: str = "", left: str = "", mark: str = ""
    ) -> None:
        cells = {
            "\nepoch": epoch,
            "\nloss": f"{row['train_loss']:.4f}" if "train_loss" in row else "",
            "\nval loss": f"{row['val_loss']:.4f}",
            "mean\nrecall": f"{row['mean_recall']:.2f}",
            "R@1 image\nto text": f"{row['i2t_R@1']:.2f}",
            "R@1 text\nto image": f"{row['t2i_R@1']:.2f}",
        }
        if kept := retained(row).values():
            cells["\nretention"] = f"{sum(kept) / len(kept):.2f}"
        cells |= {"\ntime": spent, "\nleft": left, "\nbest": mark}
        names = [name.split("\n") for name in cells]
        widths = [max(6, *map(len, name)) + 2 for name in names]
        header = [] if self.has_header else [(), *zip(*names, strict=True)]
        for line in (*header, cells.values()):
            print("".join(map(str.rjust, line, widths)).rstrip())
        self.has_header = True


class Progress(AbstractContextManager):
    """The progress bar, speed, peak memory and losses of an epoch after its `done` steps."""

    def __init__(self, loader: TrainLoader, epoch: int, done: int = 0):
        self.device = loader.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
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
        """Columns of a table: mean of the `losses`, `rate`, speed, waiting, peak memory."""
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
