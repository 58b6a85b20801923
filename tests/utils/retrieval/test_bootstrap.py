"""Bootstrap samples against what is known of the standard errors of shares."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.retrieval.bootstrap import RECALLS, SAMPLES, Comparison, interval, resample
from utils.retrieval.scores import score_features


def a_set(images, captions):
    numbers = iter(range(images * captions))
    own = {image: [next(numbers) for _ in range(captions)] for image in range(images)}
    return SimpleNamespace(own_captions=own)


def scores_of(ranks_of_images, ranks_of_captions):
    both = (SimpleNamespace(ranks=torch.tensor(r).double())
            for r in (ranks_of_images, ranks_of_captions))  # fmt: skip
    return SimpleNamespace(**dict(zip(("i2t", "t2i"), both, strict=True)))


def test_samples_spread_around_the_recalls_as_shares_do():
    """The standard error of a share p of n is sqrt(p (1 - p) / n). Captions that are found with
    their image, all or none, are as uncertain as the images."""
    found = np.arange(400) % 4 == 0  # a quarter
    ranks = np.where(found, 1, 7)
    samples = resample(scores_of(ranks, np.repeat(ranks, 5)), a_set(400, 5))
    assert list(samples) == RECALLS
    error = 100 * np.sqrt(0.25 * 0.75 / 400)
    for name in ("i2t_R@1", "t2i_R@5"):
        assert samples[name].shape == (SAMPLES,)
        assert samples[name].mean() == pytest.approx(25, abs=0.2)
        assert samples[name].std() == pytest.approx(error, rel=0.1)
        low, high = interval(samples[name])
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (samples["i2t_R@10"] == 100).all()
    expected = np.mean([samples[name] for name in RECALLS[:-1]], axis=0)
    assert samples["mean_recall"] == pytest.approx(expected)


def test_images_with_many_captions_weigh_as_much_as_in_the_recall():
    """One of two images has three of four captions; every sample has one of three recalls."""
    data = SimpleNamespace(own_captions={0: [0], 1: [1, 2, 3]})
    samples = resample(scores_of([1, 1], [9, 1, 1, 9]), data)["t2i_R@1"]
    assert set(samples.round(4)) == {0.0, 50.0, round(200 / 3, 4)}


def test_two_models_are_compared_on_the_same_samples():
    """Where a model finds one image more, no sample has it lower."""
    ranks = np.random.default_rng(0).integers(1, 12, 60)
    better = ranks.copy()
    better[ranks.argmax()] = 1
    data = a_set(60, 1)
    gained = (resample(scores_of(better, better), data)["mean_recall"]
              - resample(scores_of(ranks, ranks), data)["mean_recall"])  # fmt: skip
    assert gained.min() == 0 and gained.max() > 0


def test_scores_have_the_rank_of_each_query():
    torch.manual_seed(0)
    images, texts = torch.randn(5, 3), torch.randn(10, 3)
    own = {image: [2 * image, 2 * image + 1] for image in range(5)}
    scores = score_features(images, texts, own, {c: c // 2 for c in range(10)})
    similarity = images @ texts.T
    expected = [1 + (row > row[own[i]].max()).sum().item() for i, row in enumerate(similarity)]
    assert scores.i2t.ranks.tolist() == expected
    expected = [1 + (row > row[c // 2]).sum().item() for c, row in enumerate(similarity.T)]
    assert scores.t2i.ranks.tolist() == expected


def test_a_comparison_has_the_scores_before_and_after_and_what_was_gained():
    """Texts that are the features of their images, and images without the first channel, by which
    one differs from another."""
    torch.manual_seed(0)
    data = a_set(30, 2)
    data.img_to_txt, data.txt_to_img = data.own_captions, {c: c // 2 for c in range(60)}
    images = torch.nn.functional.normalize(torch.randn(30, 3))
    blurred = images * torch.tensor([0.0, 1.0, 1.0])
    texts = images.repeat_interleave(2, dim=0)
    found = Comparison({"before": (blurred, texts), "after": (images, texts)}, data)
    before = score_features(blurred, texts, data.img_to_txt, data.txt_to_img)
    content = found.for_json()
    assert content["t2i"]["R@1"] == content["mean_recall"] == 100
    assert content["before"]["i2t"]["R@5"] == before.i2t.recall[5] < 100
    low, high = content["intervals"]["gained"]["i2t_R@1"]
    assert 0 < low < 100 - before.i2t.recall[1] < high
    assert content["intervals"]["after"]["mean_recall"] == (100, 100)
    lines = list(found.lines())
    assert [line[:6].strip() for line in lines] == ["", "before", "after", "gained"]
    assert lines[0].endswith("R@1 text to image") and lines[2].endswith("100.00 (100.0 to 100.0)")
    alone = Comparison({"after": (images, texts)}, data)
    assert list(alone.for_json()["intervals"]) == ["after"] and len(list(alone.lines())) == 2
