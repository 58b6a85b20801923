"""Rankings by similarity: captions for one image, and the first answers to all queries of a set."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError

BLOCK_BYTES = 2**26  # of the similarities that are in memory at once
RowsOf = Callable[[slice], Tensor]  # gives these rows of the similarities, `[rows, gallery]`


class Ranked(NamedTuple):
    caption: str
    probability: float  # softmax over all captions
    similarity: float  # cosine


@torch.inference_mode()
def rank_captions(
    captions: list[str], text_features: Tensor, image: Tensor, logit_scale: Tensor
) -> list[Ranked]:
    """The captions, the most similar to an image first, from normalised features: the captions',
    `text_features` `[captions, d]`, and the image's, `image` `[d]`. `logit_scale` is the model's.
    """
    similarity = (text_features @ image[:, None]).squeeze(1)
    probability = (logit_scale.exp() * similarity).softmax(dim=0)
    order = similarity.argsort(descending=True).tolist()
    return [Ranked(captions[i], probability[i].item(), similarity[i].item()) for i in order]


class Answers(NamedTuple):
    """The first k answers to each of q queries and, behind them, the best-placed right one.

    rank        position of the best-placed right answer, from 1, `[q]`
    items       indices in the gallery, `[q, k + 1]`
    similarity  cosines, `[q, k + 1]`
    is_right    `[q, k + 1]`
    """

    rank: Tensor
    items: Tensor
    similarity: Tensor
    is_right: Tensor


def first_answers(
    rows_of: RowsOf,
    queries: int,
    gallery: int,
    truth: Mapping[int, int | list[int]],
    k: int,
) -> Answers:
    """What stands first when the gallery is ranked for each query. Ties count against the model, as
    in `compute_metrics`: a right answer stands after all others that are as similar."""
    columns = ground_truth(truth, queries, gallery)
    parts = [_first(rows_of(rows), columns[rows], k) for rows in blocks(queries, gallery)]
    return Answers(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def _first(scores: Tensor, columns: Tensor, k: int) -> Answers:
    """The answers to some queries, from their `scores` `[q, gallery]` and the indices of their
    right answers, `columns` `[q, most]`."""
    columns = columns.to(scores.device)
    absent = columns < 0
    own = scores.gather(1, columns.clamp(min=0)).masked_fill(absent, -torch.inf)
    best_score, best = own.max(dim=1, keepdim=True)
    others = scores.scatter(1, columns.where(~absent, columns[:, :1]), -torch.inf)
    rank = 1 + (others >= best_score).sum(dim=1)
    wrong = others.topk(min(k, scores.shape[1]), dim=1)
    items = torch.cat([wrong.indices, columns], dim=1)
    similarity = torch.cat([wrong.values, own], dim=1)
    k = wrong.indices.shape[1]
    # Stable: among equals the wrong ones, which are on the left, come first.
    order = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
    order = torch.cat([order, k + best], dim=1)
    return Answers(rank, items.gather(1, order), similarity.gather(1, order), order >= k)


def rows_both_ways(image_features: Tensor, text_features: Tensor) -> dict[str, RowsOf]:
    """Similarities of features `[images, d]` and `[texts, d]`, by direction. Many are computed when
    they are asked for, so that memory does not grow with their number."""
    if 4 * len(image_features) * len(text_features) <= BLOCK_BYTES:
        scores = image_features @ text_features.T
        return {"i2t": scores.__getitem__, "t2i": scores.T.__getitem__}
    return {
        "i2t": lambda rows: image_features[rows] @ text_features.T,
        "t2i": lambda rows: text_features[rows] @ image_features.T,
    }


def blocks(queries: int, gallery: int) -> Iterator[slice]:
    """Parts of the queries whose similarities to the whole gallery fit into `BLOCK_BYTES`."""
    rows = max(1, BLOCK_BYTES // (4 * gallery))
    return (slice(start, start + rows) for start in range(0, queries, rows))


def ground_truth(truth: Mapping[int, int | list[int]], queries: int, gallery: int) -> Tensor:
    """Gallery indices `[queries, most]` of each query's ground truths, -1 where there are fewer.
    Raises `InputError` for a query without any or with one twice."""
    if not queries or not gallery:
        raise InputError(f"nothing to score: {queries} queries, {gallery} to rank")
    if len(truth) > queries:
        raise InputError(f"ground truth of {len(truth)} queries, where {queries} have scores")
    lists = [np.atleast_1d(truth.get(query, [])) for query in range(queries)]
    counts = np.array([len(indices) for indices in lists])
    if not counts.all():
        raise InputError(f"query {int(counts.argmin())} has no ground truth")
    flat = np.concatenate(lists)
    if flat.dtype.kind not in "iu":
        raise InputError(f"ground truths should be integers, not {flat.dtype}")
    outside = flat[(flat < 0) | (flat >= gallery)]
    if len(outside):
        raise InputError(f"ground truth {outside[0]} is not among the {gallery} that are ranked")
    padded = np.full((queries, counts.max()), -1, dtype=np.int64)
    padded[np.arange(counts.max()) < counts[:, None]] = flat
    ordered = np.sort(padded, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise InputError(f"query {int(twice.argmax())} has the same ground truth twice")
    return torch.from_numpy(padded)
