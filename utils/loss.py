"""The contrastive loss (Radford et al. 2021, figure 3), with one or several captions an image."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from models.device import upload
from models.errors import InputError
from utils.machine.processes import ALONE, Processes, Shard

BLOCK = 1024  # rows of the similarity matrix that exist at once


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    processes: Processes = ALONE,
    texts: Tensor | None = None,
) -> Tensor:
    """The mean of the two cross-entropies over the similarities of images and texts, a scalar.

    Image features are `[n, d]`, text features `[n * k, d]`: the k captions of the first image, then
    those of the second, and so on. Each caption is a right answer for its image; the image's other
    captions are left out of that cross-entropy, since they are not wrong. Features need not be
    normalised; `logit_scale` is the logarithm of the scale, as in `CLIP.logit_scale`.

    `texts` `[n, m]`, on the CPU, tells which texts are equal, by whole numbers that are the same
    for equal texts, in all processes: first those of an image's k captions, then those of further
    texts that are right for it (repeats do not matter). A text that is right for an image is not
    wrong for it because another image brought it: the two are left out of each other's
    cross-entropy, in both directions, like an image's other captions. Where no other image's
    caption is right for an image, the loss is the same, bit for bit, with `texts` and without.

    Computed in float32 in blocks of rows, and once more for the gradient, so that the `[n, n * k]`
    matrix never exists. Of several `processes` each gives the features of its own images and
    captions and gets its part of the loss. The parts, and the gradients that come of them in each
    process, add up to the loss and the gradients of one process with all images.
    """
    n = len(image_features)
    k, rest = divmod(len(text_features), n)
    if rest or not k:
        raise InputError(f"{len(text_features)} texts for {n} images: each needs equally many")
    image_features = F.normalize(image_features.float(), dim=-1) * logit_scale.exp()
    text_features = F.normalize(text_features.float(), dim=-1)
    matching = (image_features.repeat_interleave(k, dim=0) * text_features).sum(dim=1)

    share = processes.shard_with(n)
    everyones_texts = share.gather(text_features)
    right, columns = None, None
    if texts is not None:
        if len(texts) != n or texts.shape[1] < k:
            raise InputError(f"texts {[*texts.shape]} should be [{n}, m], m being {k} at least")
        right, columns = _shared_texts(texts, k, share, everyones_texts.device)
    starts = range(0, n, BLOCK)
    blocks = [
        recompute(
            _negatives, image_features[i : i + BLOCK], everyones_texts, share.start + i, k,
            None if right is None else right[i : i + BLOCK], columns, use_reentrant=False,
        )
        for i in starts
    ]  # fmt: skip
    other_texts = torch.cat([over_texts for over_texts, _ in blocks]).repeat_interleave(k)
    other_images = torch.stack([over_images for _, over_images in blocks]).logsumexp(dim=0)
    other_images = processes.shard(processes.size).gather(other_images[None]).logsumexp(dim=0)
    other_images = other_images[share.start * k : share.stop * k]

    over_texts = torch.logaddexp(matching, other_texts)
    over_images = torch.logaddexp(matching, other_images)
    return ((over_texts + over_images) / 2 - matching).sum() / (share.total * k)


def squared_distance(features: Tensor, targets: Tensor) -> Tensor:
    """The sum over the rows of `features` of the squared distance to the same row of `targets`,
    both `[n, d]` and normalised first."""
    features, targets = (F.normalize(x.float(), dim=-1) for x in (features, targets))
    return (features - targets).square().sum()


def _shared_texts(
    texts: Tensor, k: int, share: Shard, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The columns of right texts, as `_negatives` takes them: `right` and `columns`; None twice if
    no other image of the batch brings a text that is right for one of this process's images."""
    columns = share.gather(texts[:, :k].flatten())
    count = Counter(columns.tolist())
    if all(sum(count[text] for text in set(row)) == k for row in texts.tolist()):
        return None, None
    known, columns = columns.unique(return_inverse=True)
    right = torch.searchsorted(known, texts)
    right[~torch.isin(texts, known)] = len(columns)  # the number of no column
    return upload(right, device), upload(columns, device)


def _negatives(
    rows: Tensor, texts: Tensor, start: int, k: int, right: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The logits of wrong answers, of the images `start` to `start + b`, whose scaled features are
    `rows` `[b, d]`, with all texts, `[n * k, d]`. Returns the log-sum-exp for each image over the
    texts that are wrong for it, `[b]`, and for each text over the images that it is wrong for,
    `[n * k]`. Those of other images are all wrong, but for texts whose number, in `columns`
    `[n * k]`, is one of the image's in `right` `[b, m]`; numbers are at most `n * k`."""
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows @ texts.T
    logits.unflatten(1, (-1, k)).diagonal(start).fill_(-torch.inf)  # an image with its own captions
    if right is not None:
        is_right = torch.zeros(len(rows), len(columns) + 1, dtype=torch.bool, device=rows.device)
        is_right.scatter_(1, right, True)
        logits.masked_fill_(is_right[:, columns], -torch.inf)
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)
