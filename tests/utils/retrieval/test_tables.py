"""Tables and the plot show the scores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from utils.metric import compute_metrics
from utils.retrieval.plots import plot_scores
from utils.retrieval.scores import score_features
from utils.retrieval.tables import format_table


def test_table_plot_and_json_hold_the_scores(tmp_path):
    features = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    images, texts = features.split([20, 40])
    img2txt = {i: [2 * i, 2 * i + 1] for i in range(20)}
    txt2img = {t: t // 2 for t in range(40)}
    scores = score_features(images, texts, img2txt, txt2img, range(1, 11))
    similarity = images @ texts.T
    metrics = compute_metrics(similarity, img2txt, similarity.T, txt2img, range(1, 11))
    assert json.loads(json.dumps(scores.as_dict())) == metrics
    table = format_table(scores, "test")
    assert table.startswith("test ")
    for direction in metrics:
        for name in ("R@1", "R@5", "R@10", "mAP@1", "mAP@5", "mAP@10", "median_rank", "mean_rank"):
            assert f"{metrics[direction][name]:.2f}" in table
            assert scores.columns()[f"{direction}_{name}"] == metrics[direction][name]
    assert scores.mean_recall == pytest.approx(
        np.mean([metrics[d][f"R@{k}"] for d in metrics for k in (1, 5, 10)])
    )
    assert f"\nmean recall {scores.mean_recall:.2f}" in table
    assert scores.for_json() == {"mean_recall": scores.mean_recall, **metrics}
    plot_scores(scores, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
