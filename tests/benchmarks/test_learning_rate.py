"""The benchmark of learning rates: its models and data."""

import sys

import pytest
from script_runs import ROOT

from flickr8k.render_demo import render_demo
from models.config import check_config
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import learning_rate


@pytest.mark.parametrize("width", [128, 192, 384])
def test_a_model_of_another_width_is_one_that_can_be_read(width):
    config = learning_rate.random_model(width, seed=0).config
    check_config(config)
    assert config.vision_width == width
    assert (config == CONFIGS["ViT-demo"]) == (width == 192)


def test_few_images_are_the_first_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning_rate, "FEW", 5)
    data = render_demo(tmp_path / "data", n_train=8, n_val=4)
    for _ in range(2):
        few = Flickr8kDataset(learning_rate.few_images(data, tmp_path / "few"), 64)
        assert few.text == Flickr8kDataset(data, 64).text[:25]
        assert few[0][0].shape == (3, 64, 64)


def test_results_are_means_over_seeds(capsys):
    seeds = [{"gained": 80.0, "kept": 90.0}, {"gained": 84.0, "kept": 92.0}]
    learning_rate.print_results({"width 1": {str(r): seeds for r in learning_rate.PRODUCTS}})
    assert "86.50 ± 2.12 (82, 91)" in capsys.readouterr().out
