"""Retrieval scores against their definition, written out query by query."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import InputError
from utils.metric import compute_metrics, format_table, mean_recall, plot_metrics, retrieval_metrics

K_VALUES = (1, 2, 3, 5, 10, 50)


def by_definition(scores, truth, k_values):
    """R@K, mAP@K and ranks of one direction, as DESIGN and docstring define them: sort each query's
    row, what is no ground truth first among equals, then walk down the list."""
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


@st.composite
def retrieval_problems(draw):
    """Few distinct scores, so that many tie, and images with one to six captions."""
    counts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    seed, levels = draw(st.integers(0, 2**31)), draw(st.integers(1, 12))
    random = np.random.default_rng(seed)
    images, texts = len(counts), sum(counts)
    owner = random.permutation(np.repeat(np.arange(images), counts))
    img2txt = {i: np.flatnonzero(owner == i).tolist() for i in range(images)}
    txt2img = dict(enumerate(owner.tolist()))
    scores = random.integers(0, levels, (images, texts)).astype(np.float32)
    other = random.integers(0, levels, (texts, images)).astype(np.float32)
    return scores, img2txt, other, txt2img


@settings(max_examples=300, deadline=None)
@given(retrieval_problems())
def test_compute_metrics_is_the_definition(problem):
    scores_i2t, img2txt, scores_t2i, txt2img = problem
    metrics = compute_metrics(scores_i2t, img2txt, scores_t2i, txt2img, K_VALUES)
    assert metrics["i2t"] == pytest.approx(by_definition(scores_i2t, img2txt, K_VALUES))
    assert metrics["t2i"] == pytest.approx(by_definition(scores_t2i, txt2img, K_VALUES))


@settings(max_examples=100, deadline=None)
@given(retrieval_problems(), st.integers(1, 200))
def test_retrieval_metrics_from_features_is_the_same(problem, block_bytes):
    """Small whole numbers: products are exact, so ties tie; blocks of any size."""
    scores, img2txt, _, txt2img = problem
    random = np.random.default_rng(scores.size)
    images = torch.from_numpy(random.integers(-2, 3, (len(img2txt), 3)).astype(np.float32))
    texts = torch.from_numpy(random.integers(-2, 3, (len(txt2img), 3)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.metric.BLOCK_BYTES", block_bytes)
        metrics = retrieval_metrics(images, texts, img2txt, txt2img, K_VALUES)
    scores = images @ texts.T
    assert metrics == compute_metrics(scores, img2txt, scores.T, txt2img, K_VALUES)


def test_average_precision_is_scikit_learns_when_k_covers_the_gallery():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    scores = random.normal(size=(20, 60))
    img2txt = {i: list(range(3 * i, 3 * i + 3)) for i in range(20)}
    txt2img = {t: t // 3 for t in range(60)}
    expected = [
        average_precision_score(np.isin(np.arange(60), img2txt[i]), scores[i]) for i in range(20)
    ]
    metrics = compute_metrics(scores, img2txt, scores.T, txt2img, (60,))
    assert metrics["i2t"]["mAP@60"] == pytest.approx(100 * np.mean(expected))


def test_a_model_that_says_the_same_to_everything_gets_nothing():
    scores = np.zeros((10, 50))
    img2txt = {i: list(range(5 * i, 5 * i + 5)) for i in range(10)}
    metrics = compute_metrics(scores, img2txt, scores.T, {t: t // 5 for t in range(50)}, (1, 5))
    assert metrics["i2t"]["R@5"] == metrics["t2i"]["R@5"] == 0
    assert metrics["i2t"]["median_rank"] == 46
    assert metrics["t2i"]["median_rank"] == 10


def test_minus_infinity_is_a_score_like_any_other():
    scores = np.array([[-np.inf, 1.0, 0.0], [2.0, -np.inf, -np.inf]])
    img2txt = {0: [0], 1: [1, 2]}
    metrics = compute_metrics(scores, img2txt, scores.T, {0: 0, 1: 1, 2: 1}, (1, 2, 3))
    assert metrics["i2t"] == pytest.approx(by_definition(scores, img2txt, (1, 2, 3)))


@pytest.mark.parametrize(
    "img2txt, message",
    [({0: [0], 1: []}, "query 1"), ({0: [0]}, "query 1"), ({0: [0], 1: [2]}, "among the 2")],
)
def test_unusable_ground_truth_is_named(img2txt, message):
    with pytest.raises(InputError, match=message):
        compute_metrics(np.eye(2), img2txt, np.eye(2), {0: 0, 1: 1})


def test_nan_is_refused():
    scores = np.array([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(InputError, match="NaN"):
        compute_metrics(scores, {0: 0, 1: 1}, scores.T, {0: 0, 1: 1})


def test_table_plot_and_json_hold_the_metrics(tmp_path):
    scores = np.random.default_rng(0).normal(size=(20, 40))
    img2txt = {i: [2 * i, 2 * i + 1] for i in range(20)}
    txt2img = {t: t // 2 for t in range(40)}
    metrics = compute_metrics(scores, img2txt, scores.T, txt2img, range(1, 11))
    assert json.loads(json.dumps(metrics)) == metrics
    table = format_table(metrics)
    for direction in metrics:
        for name in ("R@1", "R@5", "R@10", "mAP@1", "mAP@5", "mAP@10", "median_rank", "mean_rank"):
            assert f"{metrics[direction][name]:.2f}" in table
    assert mean_recall(metrics) == pytest.approx(
        np.mean([metrics[d][f"R@{k}"] for d in metrics for k in range(1, 11)])
    )
    plot_metrics(metrics, tmp_path / "plot.png")
    from PIL import Image

    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
