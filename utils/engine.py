"""One epoch of training, and the evaluation after it."""

import math
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.clip import CLIP
from models.errors import InputError
from models.preprocess import normalize
from utils.failures import explained
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader, image_batches
from utils.gradients import accumulate_gradients
from utils.layers import train_mode
from utils.loss import contrastive_loss
from utils.metric import K_VALUES, retrieval_metrics
from utils.optimizer import set_learning_rate
from utils.precision import Precision
from utils.ranks import ALONE, Ranks

MAX_GRAD_NORM = 1.0


@explained()
def train_one_epoch(
    model: CLIP,
    loader: TrainLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    epoch: int,
    rate_at: Callable[[int], float],
    after_step: Callable[[list[Tensor]], None],
    losses: list[Tensor],
    grad_cache: int | None = None,
) -> dict[str, float]:
    """Train for an epoch, or for what is left of it after the steps whose `losses` are given.

    `rate_at(step)` is the learning rate of each step, counted over the run; `after_step` is called
    with the losses so far; `grad_cache` is the chunk of `accumulate_gradients`. Returns the mean
    loss, the last learning rate, images/s and the share of time spent waiting for data. A loss that
    is not finite raises `InputError`.
    """
    train_mode(model)
    losses = list(losses)
    done = len(losses)
    batches = loader.epoch(epoch, start=done)
    first_step = (epoch - 1) * len(loader)
    waited = 0.0
    start = time.perf_counter()
    with tqdm(
        total=len(loader) * loader.batch_size,
        initial=done * loader.batch_size,
        unit="img",
        desc=f"epoch {epoch}",
        disable=not loader.ranks.is_first,
    ) as bar:
        for step in range(first_step + done, first_step + len(loader)):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            set_learning_rate(optimizer, rate_at(step))
            loss = accumulate_gradients(model, batch, precision, loader.ranks, grad_cache)
            loader.ranks.sum_gradients(model)
            precision.update(model, optimizer, MAX_GRAD_NORM)
            model.clamp_logit_scale()
            if len(losses) > done:  # a step late, so that a GPU has work while the bar is drawn
                _show(bar, losses[-1], rate_at(step - 1), step - 1)
            losses.append(loader.ranks.sum(loss))
            bar.update(loader.batch_size)
            after_step(losses)
        rate = rate_at(first_step + len(loader) - 1)
        _show(bar, losses[-1], rate, first_step + len(loader) - 1)
    seconds = time.perf_counter() - start
    return {
        "train_loss": torch.stack(losses).mean().item(),
        "lr": rate,
        "images_per_second": (len(losses) - done) * loader.batch_size / seconds,
        "data_wait_percent": 100 * waited / seconds,
    }


def _show(bar: tqdm, loss: Tensor, rate: float, step: int) -> None:
    value = loss.item()
    if not math.isfinite(value):
        raise InputError(
            f"the loss is {value} at step {step}, learning rate {rate:.3g}; lower --lr, raise "
            "--warmup_epochs, or train without --use_amp; earlier weights are kept"
        )
    bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2e}")


@torch.inference_mode()
def encode_images(
    model: CLIP, dataset: Flickr8kDataset, batch_size: int, num_workers: int, ranks: Ranks = ALONE
) -> Tensor:
    """Normalised float32 features `[n, d]` of all images, on the model's device; each rank encodes
    some of the batches."""
    model.eval()
    features = torch.zeros(len(dataset), model.embed_dim, device=model.device)
    own = torch.arange(len(dataset)).split(batch_size)[ranks.rank :: ranks.size]
    batches = image_batches(dataset, [rows.tolist() for rows in own], num_workers)
    with _bar(own, "encoding images", "img", ranks) as bar:
        for rows, images in zip(own, batches, strict=True):
            images = normalize(images.to(model.device, non_blocking=True))
            features[rows] = F.normalize(model.encode_image(images).float(), dim=-1)
            bar.update(len(rows))
    return ranks.sum(features)


@torch.inference_mode()
def encode_texts(
    model: CLIP, tokens: Tensor, batch_size: int = 256, ranks: Ranks = ALONE
) -> Tensor:
    """Normalised float32 features `[n, d]` of `tokens` `[n, <=77]`, on the model's device; each
    rank encodes some of the batches."""
    model.eval()
    features = torch.zeros(len(tokens), model.embed_dim, device=model.device)
    own = torch.arange(len(tokens)).split(batch_size)[ranks.rank :: ranks.size]
    with _bar(own, "encoding captions", "caption", ranks) as bar:
        for rows in own:
            features[rows] = F.normalize(model.encode_text(tokens[rows]).float(), dim=-1)
            bar.update(len(rows))
    return ranks.sum(features)


def _bar(batches: tuple[Tensor, ...], title: str, unit: str, ranks: Ranks) -> tqdm:
    total = sum(map(len, batches))
    return tqdm(total=total, desc=title, unit=unit, leave=False, disable=not ranks.is_first)


@explained()
@torch.inference_mode()
def evaluate(
    model: CLIP,
    dataset: Flickr8kDataset,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    k_values: Iterable[int] = K_VALUES,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, dict[str, float]], float]:
    """Retrieval metrics over the whole set, and the loss over batches of the training size, of each
    image and its first caption."""
    with precision.autocast():
        image_features = encode_images(model, dataset, batch_size, num_workers, ranks)
        text_features = encode_texts(model, dataset.tokens, ranks=ranks)
    if not ranks.is_first:
        return ranks.from_first(None)
    metrics = retrieval_metrics(
        image_features, text_features, dataset.img_to_txt, dataset.txt_to_img, k_values
    )
    first = [captions[0] for captions in dataset.img_to_txt.values()]
    losses = [
        contrastive_loss(images, texts, model.logit_scale)
        for images, texts in zip(
            image_features.split(batch_size), text_features[first].split(batch_size), strict=True
        )
        if len(images) == min(batch_size, len(dataset))
    ]
    return ranks.from_first((metrics, torch.stack(losses).mean().item()))


def peak_memory_mb(device: torch.device) -> float:
    """The most memory taken so far: the GPU's where there is one, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
