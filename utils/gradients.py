"""The gradients of one batch, at once or chunk by chunk."""

import torch
from torch import Tensor

from models.clip import CLIP
from utils.flickr8k_dataloader import Batch
from utils.loss import contrastive_loss
from utils.precision import Precision
from utils.ranks import Ranks


def accumulate_gradients(
    model: CLIP, batch: Batch, precision: Precision, ranks: Ranks, chunk: int | None = None
) -> Tensor:
    """Add the gradients of this rank's part of the loss to the parameters'; return that part.

    With `chunk`, activations exist for so many images at a time (gradient caching, Gao et al.
    2021): features of the whole batch first, then the loss and its gradient for each feature, then
    each chunk's features again and from their gradients those of the parameters. The sum is the
    gradient of the whole batch, at the cost of a second forward pass.
    """

    def image_features(batch: Batch) -> Tensor:
        with precision.autocast():
            return model.encode_image(batch.augmented_images())

    def text_features(batch: Batch) -> Tensor:
        with precision.autocast():
            return model.encode_text(batch.tokens)

    towers = (image_features, text_features)
    if chunk is None or chunk >= len(batch.images):
        loss = contrastive_loss(*(encode(batch) for encode in towers), model.logit_scale, ranks)
        precision.backward(loss)
        return loss.detach()

    chunks = batch.split(chunk)
    with torch.no_grad():
        features = [torch.cat([encode(part) for part in chunks]) for encode in towers]
    for tower in features:
        tower.requires_grad_()
    loss = contrastive_loss(*features, model.logit_scale, ranks)
    precision.backward(loss)
    # Tower by tower: the activations of one meet the gradients of few parameters of the other.
    for encode, of_all in zip(towers, features, strict=True):
        gradients = of_all.grad.split(chunk * len(of_all) // len(batch.images))
        for part, gradient in zip(chunks, gradients, strict=True):
            of_part = encode(part)
            if of_part.requires_grad:  # a locked tower's do not
                of_part.backward(gradient)
    return loss.detach()
