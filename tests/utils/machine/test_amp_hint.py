"""When `--use_amp` is recommended, and what that measurement leaves alone."""

import random
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flickr8k.render_demo import render_demo
from models.clip_utils import create_model
from models.weights.registry import CONFIGS
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine import amp_hint as module
from utils.machine.amp_hint import amp_hint, layer_seconds
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.training.progress import announce

CPU, CONFIG = torch.device("cpu"), CONFIGS["ViT-demo"]


@pytest.fixture
def measured(monkeypatch):
    """A function that sets what is measured; it returns the list of measurements."""

    def take(in_float32: list[float], in_bfloat16: list[float]) -> list[tuple[int, int]]:
        asked = []
        monkeypatch.setattr(
            module, "layer_seconds", lambda *sizes: asked.append(sizes) or (in_float32, in_bfloat16)
        )
        return asked

    return take


def test_the_factor_is_that_of_the_medians(measured):
    asked = measured([9.0, 1.0, 2.2], [1.1, 1.0, 50.0])  # medians 2.2 and 1.1
    hint = amp_hint(Precision(CPU, use_amp=False), CONFIG)
    assert hint.startswith("hint: ") and " 2.0 times as fast" in hint and "--use_amp" in hint
    assert "\n" not in hint and asked == [(128, 512)]  # the widths of ViT-demo's text tower


@pytest.mark.parametrize("in_bfloat16, is_hint", [(1 / 1.21, True), (1 / 1.19, False), (9, False)])
def test_a_small_gain_or_a_loss_is_not_worth_a_line(measured, in_bfloat16, is_hint):
    measured([1.0], [in_bfloat16])
    assert bool(amp_hint(Precision(CPU, use_amp=False), CONFIG)) == is_hint


def test_nothing_is_measured_where_there_is_nothing_to_recommend(measured):
    asked = measured([2.0], [1.0])
    on_gpu = SimpleNamespace(device=torch.device("cuda"), use_amp=False)
    assert amp_hint(Precision(CPU, use_amp=True), CONFIG) is None
    assert amp_hint(on_gpu, CONFIG) is None and not asked


@pytest.mark.parametrize("seconds_a_look, rounds", [(1e-6, 9), (0.011, 2), (60, 1)])
def test_a_slow_machine_measures_less(monkeypatch, seconds_a_look, rounds):
    """By a clock that goes on by so many seconds each time that it is looked at."""
    clock = (seconds_a_look * n for n in count())
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    in_float32, in_bfloat16 = layer_seconds(8, 16)
    assert len(in_float32) == len(in_bfloat16) == rounds
    assert in_float32 + in_bfloat16 == pytest.approx([seconds_a_look] * 2 * rounds)


def test_random_choices_stay_those_of_the_seed():
    def states():
        name, numbers, *rest = np.random.get_state()
        return random.getstate(), name, numbers.tobytes(), rest, torch.get_rng_state().tolist()

    before = states()
    layer_seconds(64, 256)
    assert states() == before
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


@pytest.mark.parametrize("rank, epochs_done, hints", [(0, 0, 1), (1, 0, 0), (0, 3, 0)])
def test_a_run_says_it_once_and_only_if_it_trains(
    tmp_path, capsys, measured, rank, epochs_done, hints
):
    """The other processes do not even measure, which would slow the first one's measurement."""
    asked = measured([3.0], [1.0])
    model = create_model("ViT-demo")
    data = Flickr8kDataset(render_demo(tmp_path, n_train=4, n_val=2))
    data.prepare_for(model)
    loader = TrainLoader(data, 4, CPU, processes=Processes(rank, 2))
    precision = Precision(CPU, use_amp=False)
    state = SimpleNamespace(model=model, precision=precision, epochs=[{}] * epochs_done)
    announce(state, loader, {"train": data, "val": data}, 3, tmp_path)
    assert capsys.readouterr().out.count("hint: ") == len(asked) == hints
