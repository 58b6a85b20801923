"""What a score is, written out query by query."""

import numpy as np


def by_definition(scores, truth, k_values):
    """R@K, mAP@K and ranks of one direction, as the docstring of `compute_metrics` defines them.

    Each query's row is sorted, what is no ground truth first among equals; then the list is walked
    down.
    """
    recalls = {k: [] for k in k_values}
    precisions = {k: [] for k in k_values}
    ranks = []
    for query, row in enumerate(np.asarray(scores)):
        right = set(np.atleast_1d(truth[query]).tolist())
        ranking = sorted(range(len(row)), key=lambda item: (-row[item], item in right))
        hits = [item in right for item in ranking]
        ranks.append(hits.index(True) + 1)
        for k in k_values:
            recalls[k].append(any(hits[:k]))
            gained = sum(sum(hits[: i + 1]) / (i + 1) for i in range(min(k, len(hits))) if hits[i])
            precisions[k].append(gained / min(len(right), k))
    scores = {f"R@{k}": 100 * np.mean(recalls[k]) for k in k_values}
    scores |= {f"mAP@{k}": 100 * np.mean(precisions[k]) for k in k_values}
    return scores | {"median_rank": np.median(ranks), "mean_rank": np.mean(ranks)}
