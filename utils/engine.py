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
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader, image_batches
from utils.loss import contrastive_loss
from utils.metric import K_VALUES, retrieval_metrics
from utils.optimizer import set_learning_rate
from utils.precision import Precision

MAX_GRAD_NORM = 1.0


def train_one_epoch(
    model: CLIP,
    loader: TrainLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    epoch: int,
    rate_at: Callable[[int], float],
) -> dict[str, float]:
    """Train for an epoch; `rate_at(step)` is the learning rate of each step, counted over the run.

    Returns the mean loss, the last learning rate, images/s and the share of time spent waiting for
    data. A loss that is not finite raises `InputError`.
    """
    model.train()
    losses: list[Tensor] = []
    batches = loader.epoch(epoch)
    waited = 0.0
    start = time.perf_counter()
    with tqdm(total=len(loader) * loader.batch_size, unit="img", desc=f"epoch {epoch}") as bar:
        for step in range((epoch - 1) * len(loader), epoch * len(loader)):
            asked = time.perf_counter()
            images, tokens = next(batches)
            waited += time.perf_counter() - asked
            rate = rate_at(step)
            set_learning_rate(optimizer, rate)
            with precision.autocast():
                image_features = model.encode_image(images)
                text_features = model.encode_text(tokens)
            loss = contrastive_loss(image_features, text_features, model.logit_scale)
            precision.step(loss, model, optimizer, MAX_GRAD_NORM)
            model.clamp_logit_scale()
            if losses:  # a step late, so that a GPU has work while the bar is drawn
                _show(bar, losses[-1], rate, step - 1)
            losses.append(loss.detach())
            bar.update(loader.batch_size)
        _show(bar, losses[-1], rate, step)
    seconds = time.perf_counter() - start
    return {
        "train_loss": torch.stack(losses).mean().item(),
        "lr": rate,
        "images_per_second": len(losses) * loader.batch_size / seconds,
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
    model: CLIP, dataset: Flickr8kDataset, batch_size: int, num_workers: int
) -> Tensor:
    """Normalised float32 features `[n, d]` of all images, on the model's device."""
    model.eval()
    features = torch.empty(len(dataset), model.embed_dim, device=model.device)
    indices = torch.arange(len(dataset)).split(batch_size)
    batches = image_batches(dataset, [rows.tolist() for rows in indices], num_workers)
    with tqdm(total=len(dataset), desc="encoding images", unit="img", leave=False) as bar:
        for rows, images in zip(indices, batches, strict=True):
            images = normalize(images.to(model.device, non_blocking=True))
            features[rows] = F.normalize(model.encode_image(images).float(), dim=-1)
            bar.update(len(rows))
    return features


@torch.inference_mode()
def encode_texts(model: CLIP, tokens: Tensor, batch_size: int = 256) -> Tensor:
    """Normalised float32 features `[n, d]` of `tokens` `[n, <=77]`, on the model's device."""
    model.eval()
    features = torch.empty(len(tokens), model.embed_dim, device=model.device)
    with tqdm(total=len(tokens), desc="encoding captions", unit="caption", leave=False) as bar:
        for rows in torch.arange(len(tokens)).split(batch_size):
            features[rows] = F.normalize(model.encode_text(tokens[rows]).float(), dim=-1)
            bar.update(len(rows))
    return features


@torch.inference_mode()
def evaluate(
    model: CLIP,
    dataset: Flickr8kDataset,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    k_values: Iterable[int] = K_VALUES,
) -> tuple[dict[str, dict[str, float]], float]:
    """Retrieval metrics over the whole set, and the loss over batches of the training size, of each
    image and its first caption."""
    with precision.autocast():
        image_features = encode_images(model, dataset, batch_size, num_workers)
        text_features = encode_texts(model, dataset.tokens)
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
    return metrics, torch.stack(losses).mean().item()


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
