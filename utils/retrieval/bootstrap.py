"""Bootstrap samples of recall: how much scores would differ on other images."""

import numpy as np

from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.scores import K_VALUES, TITLES, Scores

SAMPLES = 1000
RECALLS = [f"{way}_R@{k}" for way in TITLES for k in K_VALUES] + ["mean_recall"]


def resample(scores: Scores, dataset: Flickr8kDataset) -> dict[str, np.ndarray]:
    """The `RECALLS` in percent on bootstrap samples of the set's images (Efron 1979), `[SAMPLES]`
    each.

    An image brings all its captions, since they are not independent. The samples of a data set are
    always the same, so that those of two models are paired.
    """
    captions = [len(own) for own in dataset.own_captions.values()]
    image_of = np.repeat(np.arange(len(captions)), captions)
    hits = [(scores.i2t.ranks <= k).double().numpy() for k in K_VALUES]
    hits += [np.bincount(image_of, (scores.t2i.ranks <= k).double().numpy()) for k in K_VALUES]
    size = SAMPLES, len(captions)
    drawn = np.random.default_rng(0).integers(len(captions), size=size, dtype=np.int32)
    queries = [np.ones(len(captions))] * len(K_VALUES) + [np.array(captions)] * len(K_VALUES)
    recalls = [
        100 * found[drawn].sum(axis=1) / asked[drawn].sum(axis=1)
        for found, asked in zip(hits, queries, strict=True)
    ]
    return dict(zip(RECALLS, [*recalls, np.mean(recalls, axis=0)], strict=True))


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The ends of the 95% interval of bootstrap samples."""
    low, high = np.percentile(samples, (2.5, 97.5))
    return float(low), float(high)
