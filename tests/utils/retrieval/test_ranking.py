"""The first answers to queries are those of a sort."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definitions import ranking
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.retrieval.ranking import Similarities, both_ways, first_answers
from utils.retrieval.scores import score_features


@st.composite
def queries(draw):
    """(scores, positives of each query) with few distinct scores, so that many tie."""
    seed, levels = draw(st.integers(0, 2**31)), draw(st.integers(1, 12))
    random = np.random.default_rng(seed)
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    right = random.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    right[np.arange(shape[0]), random.integers(shape[1], size=shape[0])] = True
    scores = random.integers(-levels, levels, shape).astype(np.float32)
    return scores, {query: np.flatnonzero(row).tolist() for query, row in enumerate(right)}


@settings(max_examples=300)
@given(queries(), st.integers(1, 7), st.integers(1, 200))
def test_first_answers_are_those_of_a_sort(problem, k, block_bytes):
    scores, truth = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.retrieval.ranking.BLOCK_BYTES", block_bytes)
        rows = torch.from_numpy(scores).__getitem__
        found = first_answers(Similarities(*scores.shape, rows), truth, k)
    for query, row in enumerate(scores):
        order = ranking(row, truth[query])
        place = next(i for i, item in enumerate(order) if item in truth[query])
        expected = [*order[:k], order[place]]
        items = found.items[query].tolist()
        assert found.rank[query] == place + 1
        assert len(set(items[:-1])) == len(expected) - 1
        assert row[items].tolist() == row[expected].tolist() == found.similarity[query].tolist()
        is_positive = [item in truth[query] for item in expected]
        assert [item in truth[query] for item in items] == is_positive
        assert found.is_positive[query].tolist() == is_positive


def test_ranks_are_those_of_the_scores():
    """Also where a product that is computed in blocks would be rounded in another way."""
    features = F.normalize(torch.randn(400, 32, generator=torch.Generator().manual_seed(0)))
    images, texts = features.split([100, 300])
    img2txt = {i: [3 * i, 3 * i + 1, 3 * i + 2] for i in range(100)}
    txt2img = {t: t // 3 for t in range(300)}
    scores = score_features(images, texts, img2txt, txt2img)
    i2t, t2i = both_ways(images, texts)
    for of, similarities, truth in ((scores.i2t, i2t, img2txt), (scores.t2i, t2i, txt2img)):
        rank = first_answers(similarities, truth, 5).rank.double()
        assert of.mean_rank == rank.mean().item()
        assert of.recall[5] == pytest.approx(100 * (rank <= 5).double().mean().item())
