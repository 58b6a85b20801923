"""The gradients of one batch: at once or chunk by chunk, by one process or by several."""

import torch
from torch import Tensor

from models.clip import CLIP
from models.device import upload
from utils.flickr8k_dataloader import Batch
from utils.loss import contrastive_loss, squared_distance
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.training.distillation import Distillation
from utils.training.layer_groups import TOWERS, trainable_towers


def accumulate_gradients(
    model: CLIP,
    batch: Batch,
    precision: Precision,
    processes: Processes,
    chunk: int | None = None,
    distillation: Distillation | None = None,
) -> Tensor:
    """Set the parameters' gradients to those of the loss of the whole batch, of which `batch` is
    this process's part; return this process's part of the loss.

    With `chunk`, activations exist for so many images at a time (gradient caching, Gao et al.
    2021): features of the whole batch first, then the loss and its gradient for each feature, then
    each chunk's features again and from their gradients those of the parameters. The sum is the
    gradient of the whole batch, at the cost of a second forward pass.

    `keep` adds its distances to what the gradients are of, but not to the loss that is returned,
    which so can be compared with that of validation.
    """
    if distillation:
        _distill(model, batch.altered, precision, processes, distillation, chunk)
    chunks = batch.split(chunk or len(batch.images))
    at_once = len(chunks) == 1
    towers = () if at_once else trainable_towers(model)
    with torch.set_grad_enabled(at_once):
        features = {tower: _encode(model, chunks, tower, precision) for tower in TOWERS}
    for tower in towers:
        features[tower].requires_grad_()
    loss = contrastive_loss(*features.values(), model.logit_scale, processes, batch.texts)
    precision.backward(loss)
    # Tower by tower: the activations of one meet the gradients of few parameters of the other.
    for tower in towers:
        rows = chunk * len(features[tower]) // len(batch.images)
        for part, gradient in zip(chunks, features[tower].grad.split(rows), strict=True):
            _encode(model, [part], tower, precision).backward(gradient)
    _sum_gradients(model, processes)
    return loss.detach()


def _sum_gradients(model: CLIP, processes: Processes) -> None:
    """Replace every gradient by its sum over the processes, after all backward passes of a step.

    DistributedDataParallel exchanges gradients during the one backward pass of a step, but
    distillation and gradient caching have several.
    """
    if processes.size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = processes.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _distill(
    model: CLIP,
    batch: Batch | None,
    precision: Precision,
    processes: Processes,
    distillation: Distillation,
    chunk: int | None,
) -> None:
    """Set the parameters' gradients to those of `keep.weight` times the mean squared distance of
    the features of `batch`, this process's part of the altered images and captions, to those of the
    starting model; the mean over all images and that over all captions count alike."""
    total = processes.shard_with(len(batch.images) if batch else 0).total
    for part in batch.split(chunk or total) if batch else ():
        for tower in distillation.towers:
            with torch.no_grad():
                targets = _encode(distillation.start, [part], tower, precision)
            features = _encode(model, [part], tower, precision)
            per_image = len(features) // len(part.images)
            distance = squared_distance(features, targets) / (total * per_image)
            precision.backward(distillation.weight * distance)


def _encode(model: CLIP, chunks: list[Batch], tower: str, precision: Precision) -> Tensor:
    """The features of a batch's images `[n, d]` or of its captions `[n * k, d]`."""
    with precision.autocast():
        if tower in chunks[0].cached:
            inputs = [c.images if tower == "image" else c.tokens for c in chunks]
            features = [upload(of_part, model.device) for of_part in inputs]
        elif tower == "image":
            features = [model.encode_image(c.augmented_images(model.preprocess)) for c in chunks]
        else:
            features = [model.encode_text(c.tokens) for c in chunks]
    return features[0] if len(chunks) == 1 else torch.cat(features)
