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

    def features(batch: Batch) -> tuple[Tensor, Tensor]:
        with precision.autocast():
            return model.encode_image(batch.augmented_images()), model.encode_text(batch.tokens)

    if chunk is None or chunk >= len(batch.images):
        loss = contrastive_loss(*features(batch), model.logit_scale, ranks)
        precision.backward(loss)
        return loss.detach()

    chunks = batch.split(chunk)
    with torch.no_grad():
        parts = [features(part) for part in chunks]
    image_features, text_features = (
        torch.cat(towers).requires_grad_() for towers in zip(*parts, strict=True)
    )
    loss = contrastive_loss(image_features, text_features, model.logit_scale, ranks)
    precision.backward(loss)
    k = len(text_features) // len(image_features)
    gradients = zip(
        image_features.grad.split(chunk), text_features.grad.split(chunk * k), strict=True
    )
    for part, gradient in zip(chunks, gradients, strict=True):
        trained = [
            pair for pair in zip(features(part), gradient, strict=True) if pair[0].requires_grad
        ]  # fmt: skip - a locked tower's do not
        torch.autograd.backward(*zip(*trained, strict=True))
    return loss.detach()
