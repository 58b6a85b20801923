"""Rankings by similarity: the ranks of positives, the rule for ties, and the first answers."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError

BLOCK_BYTES = 2**26  # of similarities in memory at once
MANY_POSITIVES = 8  # of a query; for more, sorting its scores is faster than a pass for each

Positives = Mapping[int, int | list[int]]  # {query: gallery indices of its positives}


class Ranked(NamedTuple):
    caption: str
    probability: float  # of `CLIP.probabilities`
    similarity: float  # cosine


@torch.inference_mode()
def rank_captions(
    captions: list[str], text_features: Tensor, image: Tensor, model: CLIP
) -> list[Ranked]:
    """The captions, the most similar to `image` first; features are `[captions, d]` and `[d]`."""
    similarity = (text_features @ image[:, None]).squeeze(1)
    probability = model.probabilities(similarity)
    order = similarity.argsort(descending=True).tolist()
    return [Ranked(captions[i], probability[i].item(), similarity[i].item()) for i in order]


class Similarities(NamedTuple):
    """Similarities of queries to a gallery."""

    queries: int
    gallery: int
    rows: Callable[[slice], Tensor]  # those of some queries, `[rows, gallery]`

    def blocks(self, positives: Positives) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows, in blocks of at most `BLOCK_BYTES`, and their `positive_indices`."""
        indices = positive_indices(positives, self.queries, self.gallery)
        size = max(1, BLOCK_BYTES // (4 * self.gallery))
        for start in range(0, self.queries, size):
            part = slice(start, start + size)
            scores = self.rows(part)
            yield scores, indices[part].to(scores.device)


def both_ways(image_features: Tensor, text_features: Tensor) -> tuple[Similarities, Similarities]:
    """Similarities of images to texts and of texts to images, from features `[images, d]` and
    `[texts, d]`. Where they are many, rows are computed on demand, so memory does not grow."""
    images, texts = len(image_features), len(text_features)
    if 4 * images * texts <= BLOCK_BYTES:
        scores = image_features @ text_features.T
        rows = scores.__getitem__, scores.T.__getitem__
    else:
        rows = (
            lambda part: image_features[part] @ text_features.T,
            lambda part: text_features[part] @ image_features.T,
        )
    return Similarities(images, texts, rows[0]), Similarities(texts, images, rows[1])


def positive_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Ranks `[q, most]` (from 1, ascending, on the CPU) of the `positive_indices` `[q, most]` in
    the rows of `scores` `[q, gallery]`; infinite where a query has fewer positives. Ties count
    against the model: a positive stands after every negative of the same score."""
    if scores.amax().isnan():
        raise InputError("the scores hold NaN: the features of this model are not finite")
    absent = positives < 0
    own = _scores_of(positives, scores)
    own = own.sort(dim=1, descending=True, stable=True).values  # stable: the absent stay last
    most = own.shape[1]
    if most > MANY_POSITIVES:
        as_high = scores.shape[1] - torch.searchsorted(scores.sort(dim=1).values.contiguous(), own)
    else:
        counts = [(scores >= s).sum(dim=1, dtype=torch.int32) for s in own.split(1, dim=1)]
        as_high = torch.stack(counts, dim=1)
    own_as_high = most - torch.searchsorted(own.flip(1), own)
    own_as_high = own_as_high.minimum((~absent).sum(dim=1, keepdim=True))
    # Before a positive stand all negatives that score as high, and the better positives.
    ranks = as_high - own_as_high + torch.arange(1, most + 1, device=scores.device)
    return ranks.cpu().double().masked_fill(absent.cpu(), torch.inf)


def _scores_of(positives: Tensor, scores: Tensor) -> Tensor:
    """The scores `[q, most]` of the positives; minus infinity where there are fewer."""
    return scores.gather(1, positives.clamp(min=0)).masked_fill(positives < 0, -torch.inf)


class Answers(NamedTuple):
    """The first k answers to each of q queries and, behind them, the best-ranked positive."""

    rank: Tensor  # of the best-ranked positive, from 1, `[q]`
    items: Tensor  # indices in the gallery, `[q, k + 1]`
    similarity: Tensor  # cosines, `[q, k + 1]`
    is_positive: Tensor  # `[q, k + 1]`


def first_answers(similarities: Similarities, positives: Positives, k: int) -> Answers:
    """The first answers to each query, ranked as `positive_ranks` does it."""
    parts = [_first(*block, k) for block in similarities.blocks(positives)]
    return Answers(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _first(scores: Tensor, positives: Tensor, k: int) -> Answers:
    rank = positive_ranks(scores, positives)[:, 0].long()
    own = _scores_of(positives, scores)
    best = own.argmax(dim=1, keepdim=True)
    filled = positives.where(positives >= 0, positives[:, :1])
    negatives = scores.scatter(1, filled, -torch.inf).topk(min(k, scores.shape[1]), dim=1)
    items = torch.cat([negatives.indices, positives], dim=1)
    similarity = torch.cat([negatives.values, own], dim=1)
    k = negatives.indices.shape[1]
    # Stable: of equal scores the negatives, which are on the left, come first.
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
    order = torch.cat([order, k + best], dim=1)
    return Answers(rank, items.gather(1, order), similarity.gather(1, order), order >= k)


def positive_indices(positives: Positives, queries: int, gallery: int) -> Tensor:
    """Gallery indices of each query's positives, `[queries, most]`, -1 where it has fewer. Raises
    `InputError` for unusable positives."""
    if not queries or not gallery:
        raise InputError(f"nothing to score: {queries} queries, {gallery} to rank")
    if len(positives) > queries:
        raise InputError(f"positives of {len(positives)} queries, where {queries} have scores")
    lists = [np.atleast_1d(positives.get(query, [])) for query in range(queries)]
    counts = np.array([len(indices) for indices in lists])
    if not counts.all():
        raise InputError(f"query {int(counts.argmin())} has no positive")
    flat = np.concatenate(lists)
    if flat.dtype.kind not in "iu":
        raise InputError(f"positives should be integers, not {flat.dtype}")
    outside = flat[(flat < 0) | (flat >= gallery)]
    if len(outside):
        raise InputError(f"positive {outside[0]} is not among the {gallery} that are ranked")
    padded = np.full((queries, counts.max()), -1, dtype=np.int64)
    padded[np.arange(counts.max()) < counts[:, None]] = flat
    ordered = np.sort(padded, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise InputError(f"query {int(twice.argmax())} has the same positive twice")
    return torch.from_numpy(padded)
