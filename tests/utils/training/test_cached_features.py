"""Cached features of frozen towers: the same training as without."""

import copy
import csv

import pytest
import torch
from open_clip_folders import efficientnet_bert
from script_runs import error_line, run_script

from flickr8k.render_demo import render_demo
from models.clip_utils import create_model, load
from models.errors import InputError
from utils import Flickr8kDataset
from utils.flickr8k_dataloader import TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.retrieval.evaluation import Evaluator
from utils.runs.checkpoint import save_weights
from utils.training.distillation import Distillation
from utils.training.gradients import accumulate_gradients
from utils.training.layer_groups import cache_features, freeze, train_mode

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=21, n_val=9)


def frozen_model(tower):
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    freeze(model, tower, unlocked=0)
    return model


def gradients_of_an_epoch(model, loader, precision, chunk):
    train_mode(model)
    losses = [
        accumulate_gradients(model, batch, precision, ALONE, chunk) for batch in loader.epoch(1)
    ]
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.stack(losses), torch.cat([gradient.flatten() for gradient in gradients])


def never(_):
    raise AssertionError("a frozen tower is asked")


@pytest.mark.parametrize("use_amp", [False, True])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_they_stand_in_for_the_tower_in_steps_and_scores(root, tower, chunk, use_amp):
    model, precision = frozen_model(tower), Precision(CPU, use_amp)
    train_set, val_set = (Flickr8kDataset(root, model=model, split=s) for s in ("train", "val"))
    loader = TrainLoader(train_set, 7, CPU, augment=tower == "text", captions_per_image=2)
    expected = gradients_of_an_epoch(model, loader, precision, chunk)
    evaluator = Evaluator(loader, precision)
    scored = evaluator.score(model, val_set)

    cached = cache_features(model, loader, val_set, precision)
    setattr(model, f"encode_{tower}", never)
    found = gradients_of_an_epoch(model, loader, precision, chunk)
    # In mixed precision, features computed once have a residual stream in float32, those of a step
    # one in bfloat16, whose numbers have 8 bits.
    tolerance = 2**-5 if use_amp else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    metrics, loss = evaluator.score(model, val_set, cached=cached)
    assert metrics == scored[0] and loss == pytest.approx(scored[1], rel=tolerance)


@pytest.mark.parametrize("chunk", [None, 3])
def test_of_towers_whose_last_projections_learn_the_inputs_of_these_are_kept(root, tmp_path, chunk):
    efficientnet_bert(tmp_path / "model")
    model, precision = load(tmp_path / "model", "cpu")[0], Precision(CPU, use_amp=False)
    for tower in ("image", "text"):
        freeze(model, tower, unlocked=0)
    train_set, val_set = (Flickr8kDataset(root, model=model, split=s) for s in ("train", "val"))
    loader = TrainLoader(train_set, 7, CPU, augment=False, captions_per_image=2, alter=True)
    expected = gradients_of_an_epoch(model, loader, precision, chunk)
    evaluator = Evaluator(loader, precision)
    metrics, loss = evaluator.score(model, val_set)

    cached = cache_features(model, loader, val_set, precision)
    model.visual.trunk.forward = model.text.transformer.forward = never
    found = gradients_of_an_epoch(model, loader, precision, chunk)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    found = evaluator.score(model, val_set, cached=cached)
    assert found[0] == metrics and found[1] == pytest.approx(loss, rel=1e-5)
    unused = torch.tensor([], dtype=torch.int64)
    itself = Distillation(copy.deepcopy(model), 1.0, ["image", "text"], unused)  # at no distance
    (batch,) = list(loader.epoch(1))[:1]
    accumulate_gradients(model, batch, precision, ALONE, chunk)
    alone = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    accumulate_gradients(model, batch, precision, ALONE, chunk, itself)
    both = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(both, alone, strict=True)
    )


@pytest.mark.parametrize("cached", [False, True])
def test_images_that_cannot_be_read_are_listed_before_training(root, tmp_path, cached):
    root = render_demo(tmp_path / "data", n_train=8, n_val=2)
    for name in ("train_0003", "train_0006"):
        (root / "images" / f"{name}.png").write_bytes(b"none")
    model = frozen_model("image")
    train_set, val_set = (Flickr8kDataset(root, model=model, split=s) for s in ("train", "val"))
    if cached:
        train_set.cache()
    loader = TrainLoader(train_set, 4, CPU, augment=False)
    with pytest.raises(InputError, match=r"^2 images cannot be read:\n.*_0003.*\n.*_0006.*$"):
        cache_features(model, loader, val_set, Precision(CPU, use_amp=False))


SCRATCH = ["--resume_training", "none", "--model", "ViT-tiny", "--lr", 1e-3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--lock_image", "--no_augment", "--lock_text", 2, "--ema", 0.9],
        ["--lock_text", "--grad_cache", 4, "--cache"],
    ],
)
def test_a_whole_run_has_the_losses_and_scores_that_it_has_without(root, tmp_path, arguments):
    rows = []
    for more in ([], ["--cache_features"]):
        folder = tmp_path / f"logs{len(more)}"
        run_script("train.py", *SCRATCH, *arguments, *more, "--dataset_path", root, "--epochs", 2,
                   "--batch_size", 7, "--log_dir", folder, cwd=tmp_path)  # fmt: skip
        (run,) = folder.iterdir()
        with (run / "metrics.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    timed = {"images_per_second", "data_wait_percent", "peak_memory_mb"}
    for one, other in zip(*rows, strict=True):
        for name in one.keys() - timed:
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), name


@pytest.mark.slow
def test_mixtures_of_weights_have_the_scores_that_they_have_without(root, tmp_path):
    save_weights(frozen_model("image"), tmp_path / "start.pth")
    rows = []
    for more in ([], ["--cache_features"]):
        folder = tmp_path / f"logs{len(more)}"
        run_script("train.py", "--resume_training", tmp_path / "start.pth", "--lock_image",
                   "--no_augment", *more, "--dataset_path", root, "--epochs", 2, "--lr", 1e-3,
                   "--batch_size", 7, "--log_dir", folder, cwd=tmp_path)  # fmt: skip
        with next(folder.glob("*/wise_ft.csv")).open(newline="") as file:
            rows += [float(value) for row in csv.DictReader(file) for value in row.values()]
    half = len(rows) // 2
    assert half and rows[:half] == pytest.approx(rows[half:], rel=1e-4)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--lock_image or --lock_text"),
        (["--lock_text", 1], "--lock_image or --lock_text"),
        (["--lock_image"], "--no_augment"),
        (["--lock_image", "--lock_text", 1], "--no_augment"),
    ],
)
def test_arguments_that_do_not_allow_it_are_refused(root, tmp_path, arguments, named):
    arguments = [*SCRATCH, "--dataset_path", root, "--cache_features", *arguments]
    assert named in error_line("train.py", *arguments, cwd=tmp_path)
