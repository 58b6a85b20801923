"""The ranking of a folder's images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.retrieval import search
from utils.retrieval.search import most_similar


@st.composite
def collections(draw):
    """Normalised features with many that are equal or nearly so, and a query."""
    n, d = draw(st.integers(1, 60)), draw(st.sampled_from([1, 3, 64, 512]))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    query = random.normal(size=d)
    spread = 10.0 ** -draw(st.integers(0, 9))
    features = query + spread * random.normal(size=(n, d))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features = features[random.integers(0, n, n)].astype(np.float16)
    return features, (query / np.linalg.norm(query)).astype(np.float32)


@settings(max_examples=100)
@given(collections(), st.integers(1, 70), st.sampled_from([1, 7, 2048]))
def test_the_ranking_is_that_of_all_similarities(collection, count, block):
    """Features whose similarities differ by less than float32's rounding may change places."""
    features, query = collection
    scores = (features.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    expected = np.sort(scores)[::-1][:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "BLOCK", block)
        found = most_similar(torch.from_numpy(features), torch.from_numpy(query), count)
    items, similarities = zip(*found, strict=True)
    assert len(set(items)) == len(expected)
    assert similarities == pytest.approx(scores[list(items)], abs=1e-6)
    assert similarities == pytest.approx(expected, abs=1e-6)
