"""Bootstrap samples of recall: how much scores would differ on other images."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.encode import Features
from utils.retrieval.scores import K_VALUES, MAIN, TITLES, Scores, score_features

SAMPLES = 1000
RECALLS = [f"{way}_R@{k}" for way in TITLES for k in K_VALUES] + ["mean_recall"]


def resample(scores: Scores, dataset: Flickr8kDataset) -> dict[str, np.ndarray]:
    """The `RECALLS` in percent on bootstrap samples of the set's images (Efron 1979), `[SAMPLES]`
    each. An image brings all its captions, since they are not independent. The samples of a data
    set are always the same, so that those of two models are paired."""
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


class Comparison:
    """Scores on a data set from the features of models, such as `{"before": ..., "after": ...}`,
    with 95% intervals of the `RECALLS`. Of two models there is also what the second one gained."""

    def __init__(self, features: Mapping[str, Features], dataset: Flickr8kDataset):
        positives = dataset.img_to_txt, dataset.txt_to_img
        self.scores = {
            name: score_features(*of_model, *positives, range(1, 11))
            for name, of_model in features.items()
        }
        found = {name: scores.columns() for name, scores in self.scores.items()}
        samples = {name: resample(scores, dataset) for name, scores in self.scores.items()}
        if len(features) == 2:
            before, after = features
            for rows in (found, samples):
                rows["gained"] = {r: rows[after][r] - rows[before][r] for r in RECALLS}
        self.found = {name: {r: row[r] for r in RECALLS} for name, row in found.items()}
        self.intervals = {
            name: {r: interval(row[r]) for r in RECALLS} for name, row in samples.items()
        }

    def for_json(self) -> dict[str, Any]:
        """The scores of the last model, those of the other, and the intervals."""
        *others, last = self.scores
        content = {**self.scores[last].for_json(), "intervals": self.intervals}
        return content | {name: self.scores[name].for_json() for name in others}

    def lines(self) -> Iterator[str]:
        """A table of mean recall and R@1 with their intervals, of the models and the gain."""
        yield " " * 6 + "".join(f"{name:>25}" for name in MAIN)
        for name, found in self.found.items():
            cells = (
                "{:.2f} ({:.1f} to {:.1f})".format(found[r], *self.intervals[name][r])
                for r in MAIN.values()
            )
            yield f"{name:6}" + "".join(f"{cell:>25}" for cell in cells)
