"""The gradients of one batch: at once or chunk by chunk, by one process or by several."""

from functools import partial

import torch
from torch import Tensor

from models.clip import CLIP
from models.device import upload
from utils.flickr8k_dataloader import Batch
from utils.loss import contrastive_loss, squared_distance
from utils.machine.precision import Precision, tf32_products
from utils.machine.processes import Processes
from utils.retrieval.encode import projected
from utils.training.distillation import Distillation
from utils.training.layer_groups import TOWERS, trainable_towers


@tf32_products(True)
def accumulate_gradients(
    model: CLIP,
    batch: Batch,
    precision: Precision,
    processes: Processes,
    chunk: int | None = None,
    distillation: Distillation | None = None,
) -> Tensor:
    """Set the parameters' gradients to those of the loss of the whole batch, and return this
    process's part of the loss, without `distillation`, so that it compares with the validation
    loss. `batch` is this process's part of the batch.

    With `chunk`, only the activations of so many images exist at a time (gradient caching, Gao et
    al. 2021): first the features of the whole batch, then the loss and its gradient for each
    feature, then chunk by chunk the features again and the gradients of the parameters. The sum is
    the gradient of the whole batch, at the cost of a second forward pass.
    """
    if distillation:
        _distill(model, batch.altered, precision, processes, distillation=distillation, chunk=chunk)
    if chunk and chunk < len(batch.images):
        loss = _loss_by_chunks(model, batch, precision, processes, chunk)
    else:
        images, texts = (_encode(model, batch, tower, precision) for tower in TOWERS)
        loss = _loss(model, images, texts, processes, batch)
        precision.backward(loss)
    _sum_gradients(model, processes)
    return loss.detach()


def _loss(model: CLIP, images: Tensor, texts: Tensor, processes: Processes, batch: Batch) -> Tensor:
    return contrastive_loss(
        images, texts, model.logit_scale, processes, batch.texts, logit_bias=model.logit_bias
    )


def _loss_by_chunks(
    model: CLIP, batch: Batch, precision: Precision, processes: Processes, chunk: int
) -> Tensor:
    """The loss of the whole batch; its gradients are added by gradient caching."""
    chunks, towers = batch.split(chunk), trainable_towers(model)
    with torch.no_grad():
        features = {
            tower: torch.cat([_encode(model, part, tower, precision) for part in chunks])
            for tower in TOWERS
        }
    for tower in towers:
        features[tower].requires_grad_()
    loss = _loss(model, *features.values(), processes, batch)
    precision.backward(loss)
    # One tower after the other, so that few gradients lie in memory beside the activations.
    for tower in towers:
        rows = chunk * len(features[tower]) // len(batch.images)
        for part, gradient in zip(chunks, features[tower].grad.split(rows), strict=True):
            _encode(model, part, tower, precision).backward(gradient)
    return loss


def _sum_gradients(model: CLIP, processes: Processes) -> None:
    """Replace every gradient by its sum over the processes, after all backward passes of a step:
    distillation and gradient caching have several, DistributedDataParallel allows one."""
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
    """Set the parameters' gradients to those of the distillation loss: the weight times the mean
    squared distance between the features of `model` and of the starting model, on `batch`, this
    process's part of the altered images and captions. Images and captions count alike."""
    total = processes.shard_with(len(batch.images) if batch else 0).total
    for part in batch.split(chunk or total) if batch else ():
        for tower in distillation.towers:
            with torch.no_grad():
                targets = _encode(distillation.start, part, tower, precision)
            features = _encode(model, part, tower, precision)
            per_image = len(features) // len(part.images)
            distance = squared_distance(features, targets) / (total * per_image)
            precision.backward(distillation.weight * distance)
    distillation.keep_unused_words(model)


def _encode(model: CLIP, batch: Batch, tower: str, precision: Precision) -> Tensor:
    """The features of a batch's images `[n, d]`, augmented in float32, or captions `[n * k, d]`."""
    if tower in batch.cached:
        inputs = upload(batch.images if tower == "image" else batch.tokens, model.device)
        encode = partial(projected, model, tower)
    elif tower == "image":
        encode, inputs = model.encode_image, batch.augmented_images(model.preprocess)
    else:
        encode, inputs = model.encode_text, batch.tokens
    with precision.autocast():
        return encode(inputs)
