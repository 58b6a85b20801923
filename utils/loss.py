"""The contrastive loss (Radford et al. 2021, figure 3) and the sigmoid loss (Zhai et al. 2023,
algorithm 1), with one or several captions an image."""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from models.device import upload
from models.errors import InputError
from utils.machine.precision import tf32_products
from utils.machine.processes import ALONE, Processes, Shard

BLOCK = 1024  # rows of the similarity matrix that exist at once


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    processes: Processes = ALONE,
    texts: Tensor | None = None,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """The mean of the two cross-entropies over the similarities of images and texts, a scalar.

    image_features  `[n, d]`, normalised here
    text_features   `[n * k, d]`, normalised here: the k captions of each image, image by image
    logit_scale     logarithm of the scale, as in `CLIP.logit_scale`
    texts           `[n, m]` on the CPU: ids of each image's positives, first of its k captions;
                    equal texts have equal ids in all processes, and ids may repeat
    logit_bias      of a SigLIP, as in `CLIP.logit_bias`: the loss is then the sigmoid loss

    Each caption and its image are a pair. Other positives of the image, and other images that the
    caption is a positive of, are left out of the pair's cross-entropies; all else is a negative.
    Without `texts` the positives of an image are its k captions; the loss is the same, bit for bit,
    if the images of the batch share no text.

    The sigmoid loss takes every image with every caption for a question of its own: whether the
    caption is one of the image's positives. It is the sum of the cross-entropies of all answers,
    divided by the number of captions.

    Each of several `processes` gives the features of its own images and captions and gets its part
    of the loss. Over the processes, the parts and the gradients add up to those of one process.

    The similarity matrix, float32, exists only in blocks of `BLOCK` rows: each block is reduced to
    log-sum-exps, and the backward pass computes it a second time.
    """
    n = len(image_features)
    k, rest = divmod(len(text_features), n)
    if rest or not k:
        raise InputError(f"{len(text_features)} texts for {n} images: each needs equally many")
    if texts is not None and (len(texts) != n or texts.shape[1] < k):
        raise InputError(f"texts {[*texts.shape]} should be [{n}, m], m being {k} at least")
    image_features = F.normalize(image_features.float(), dim=-1) * logit_scale.exp()
    text_features = F.normalize(text_features.float(), dim=-1)
    pairs = (image_features.repeat_interleave(k, dim=0) * text_features).sum(dim=1)

    shard = processes.shard_with(n)
    all_texts = shard.gather(text_features)
    shared = None if texts is None else _shared_texts(texts, k, shard, all_texts.device)
    of_block, *others = (_negatives,) if logit_bias is None else (_cross_entropies, logit_bias)
    blocks = []
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        of_rows = shared and (shared[0][rows], shared[1])
        inputs = image_features[rows], all_texts, shard.start + i, k, of_rows, *others
        blocks.append(recompute(of_block, *inputs, use_reentrant=False, preserve_rng_state=False))
    if logit_bias is not None:
        return torch.stack(blocks).sum() / (shard.total * k)
    negative_texts = torch.cat([of_images for of_images, _ in blocks]).repeat_interleave(k)
    negative_images = torch.stack([of_texts for _, of_texts in blocks]).logsumexp(dim=0)
    # Each process has the log-sum-exps over its own images, of all texts.
    negative_images = processes.shard(processes.size).gather(negative_images[None]).logsumexp(dim=0)
    negative_images = negative_images[shard.start * k : shard.stop * k]

    over_texts = torch.logaddexp(pairs, negative_texts)
    over_images = torch.logaddexp(pairs, negative_images)
    return ((over_texts + over_images) / 2 - pairs).sum() / (shard.total * k)


def squared_distance(features: Tensor, targets: Tensor) -> Tensor:
    """The sum of the squared distances between rows of both, `[n, d]`, normalised first."""
    features, targets = (F.normalize(x.float(), dim=-1) for x in (features, targets))
    return (features - targets).square().sum()


def _shared_texts(
    texts: Tensor, k: int, shard: Shard, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """For `_negatives`; None if no positive of this process's images is another's caption."""
    columns = shard.gather(texts[:, :k].flatten())
    count = Counter(columns.tolist())
    if all(sum(count[text] for text in set(row)) == k for row in texts.tolist()):
        return None
    ids, columns = columns.unique(return_inverse=True)
    positives = torch.searchsorted(ids, texts)
    positives[~torch.isin(texts, ids)] = len(columns)  # the id of no column
    return upload(positives, device), upload(columns, device)


def _negatives(
    images: Tensor, texts: Tensor, start: int, k: int, shared: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The log-sum-exps of the logits of negatives: for each image over texts, `[b]`, and for each
    text over images, `[n * k]`.

    `images` `[b, d]`, scaled, are those from `start` on; `texts` `[n * k, d]` are all. `shared` are
    the ids of each image's positives, `[b, m]`, and of all texts, `[n * k]`, from 0 to `n * k`.
    """
    with torch.autocast(images.device.type, enabled=False), tf32_products(False):
        logits = images @ texts.T
    _fill_positives(logits, -torch.inf, start, k, shared)
    return logits.logsumexp(dim=1), logits.logsumexp(dim=0)


def _cross_entropies(
    images: Tensor,
    texts: Tensor,
    start: int,
    k: int,
    shared: tuple[Tensor, Tensor] | None,
    logit_bias: Tensor,
) -> Tensor:
    """The sum of the sigmoid loss over all pairs of these images and texts; see `_negatives`."""
    with torch.autocast(images.device.type, enabled=False), tf32_products(False):
        logits = images @ texts.T + logit_bias
    signs = torch.full_like(logits, -1)
    _fill_positives(signs, 1, start, k, shared)
    return -F.logsigmoid(signs * logits).sum()


def _fill_positives(
    pairs: Tensor, value: float, start: int, k: int, shared: tuple[Tensor, Tensor] | None
) -> None:
    """Set `pairs` `[b, n * k]` of images and texts to a value where the text is a positive."""
    pairs.unflatten(1, (-1, k)).diagonal(start).fill_(value)  # an image's own captions
    if shared:
        positives, columns = shared
        masked = torch.zeros(len(pairs), len(columns) + 1, dtype=torch.bool, device=pairs.device)
        masked.scatter_(1, positives, True)
        pairs.masked_fill_(masked[:, columns], value)
