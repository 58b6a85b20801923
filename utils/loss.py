"""The contrastive loss (Radford et al. 2021, figure 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 1024  # rows of the similarity matrix that exist at once


def contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The mean of the two cross-entropies over the similarity matrix of n pairs, a scalar.

    Features `[n, d]` need not be normalised; `logit_scale` is the logarithm of the scale, as in
    `CLIP.logit_scale`. Computed in float32 in blocks of rows, each made anew for the gradient, so
    that the `[n, n]` matrix never exists.
    """
    image_features = F.normalize(image_features.float(), dim=-1) * logit_scale.exp()
    text_features = F.normalize(text_features.float(), dim=-1)
    matching = (image_features * text_features).sum(dim=1)
    blocks = [
        checkpoint(_log_sums, rows, text_features, use_reentrant=False)
        for rows in image_features.split(BLOCK)
    ]
    over_texts = torch.cat([row_sums for row_sums, _ in blocks])
    over_images = torch.stack([column_sums for _, column_sums in blocks]).logsumexp(dim=0)
    return (over_texts + over_images).mean() / 2 - matching.mean()


def _log_sums(rows: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows @ text_features.T
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)
