"""What a score is, written out query by query, and what the loss is, caption by caption."""

import numpy as np
import torch
import torch.nn.functional as F

from utils.retrieval.scores import K_VALUES, DirectionScores, Scores


def equal_scores(percent):
    """Scores that are `percent` at every K, in both directions; ranks are 1."""
    at = dict.fromkeys(K_VALUES, percent)
    direction = DirectionScores(at, at, 1.0, 1.0, ranks=torch.ones(1))
    return Scores(direction, direction)


def ranking(row, right):
    """All items, the most similar first; among equals, what is not `right` comes first."""
    return sorted(range(len(row)), key=lambda item: (-row[item], item in right))


def by_definition(scores, truth, k_values):
    """R@K, mAP@K and ranks of one direction, as the docstring of `compute_metrics` defines them.

    Each query's row is sorted; then the list is walked down.
    """
    recalls = {k: [] for k in k_values}
    precisions = {k: [] for k in k_values}
    ranks = []
    for query, row in enumerate(np.asarray(scores)):
        right = set(np.atleast_1d(truth[query]).tolist())
        hits = [item in right for item in ranking(row, right)]
        ranks.append(hits.index(True) + 1)
        for k in k_values:
            recalls[k].append(any(hits[:k]))
            gained = sum(sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(hits))) if hits[i])
            precisions[k].append(gained / min(len(right), k))
    scores = {f"R@{k}": 100 * np.mean(recalls[k]) for k in k_values}
    scores |= {f"mAP@{k}": 100 * np.mean(precisions[k]) for k in k_values}
    return scores | {"median_rank": np.median(ranks), "mean_rank": np.mean(ranks)}


def loss_by_definition(image_features, text_features, logit_scale, texts=None):
    """Figure 3 of Radford et al. 2021, in the precision of its input; with several captions an
    image, the mean over them. Left out are the image's other captions and, of other images, the
    captions that are its positives, whose text is among its `texts` `[n, m]`."""
    n, k = len(image_features), len(text_features) // len(image_features)
    texts = torch.arange(n * k).view(n, k) if texts is None else texts
    positives = [set(row.tolist()) for row in texts]
    text = texts[:, :k].flatten().tolist()
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    logits = image_features @ text_features.T * logit_scale.exp()
    total = 0
    for i in range(n):
        negative_texts = [t for t in range(n * k) if t // k != i and text[t] not in positives[i]]
        for caption in range(i * k, (i + 1) * k):
            negative_images = [j for j in range(n) if j != i and text[caption] not in positives[j]]
            over_texts = logits[i, [caption, *negative_texts]][None]
            over_images = logits[[i, *negative_images], caption][None]
            total += F.cross_entropy(over_texts, torch.tensor([0]))
            total += F.cross_entropy(over_images, torch.tensor([0]))
    return total / (2 * n * k)


def sigmoid_loss_by_definition(image_features, text_features, logit_scale, logit_bias, texts=None):
    """Algorithm 1 of Zhai et al. 2023, in the precision of its input; with several captions an
    image, the mean over them. A caption is a positive of each image among whose `texts` `[n, m]`
    its text is."""
    n, k = len(image_features), len(text_features) // len(image_features)
    texts = torch.arange(n * k).view(n, k) if texts is None else texts
    text = texts[:, :k].flatten().tolist()
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    logits = image_features @ text_features.T * logit_scale.exp() + logit_bias
    total = 0
    for i in range(n):
        for caption in range(n * k):
            sign = 1 if text[caption] in texts[i].tolist() else -1
            total += torch.log1p((-sign * logits[i, caption]).exp())
    return total / (n * k)
