"""What a run measures of the abilities that its weights had, and what it does with that."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import error_line, run_script
from spawned import in_processes

from flickr8k.render_demo import render_demo
from models.clip_utils import create_model
from models.errors import InputError
from models.preprocess import open_image
from utils import Flickr8kDataset
from utils.machine.processes import ALONE
from utils.retrieval.tables import points_lost
from utils.training.retention import Retention, names_of

BATCH = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images to train on, and two sets besides: colours, and other captions."""
    work = tmp_path_factory.mktemp("retention")
    render_demo(work / "data", n_train=48, n_val=12)
    render_demo(work / "旧的$x^", n_train=2, n_val=10)
    random = np.random.default_rng(0)
    for n, colour in enumerate(["red", "green", "blue", "white"], 5):
        (work / "colours" / "val" / colour).mkdir(parents=True)
        for i in range(2 * n):
            pixels = 0.6 * np.array(Image.new("RGB", (4, 4), colour))
            pixels = (pixels + random.integers(0, 100, pixels.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(work / "colours" / "val" / colour / f"{i}.png")
    return work


def read_rows(file):
    with file.open(encoding="utf-8", newline="") as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def tuned(work):
    """(the weights that training started from, the run, what it printed); the rate is so high that
    the scores change."""
    run_script("train.py", "--resume_training", "none", "--model", "ViT-demo", "--lr", 1e-3,
               "--dataset_path", "data", "--batch_size", BATCH, "--epochs", 2, "--log_dir", "first",
               cwd=work)  # fmt: skip
    (weights,) = work.glob("first/*/weights/best_epoch_weights.pth")
    done = run_script("train.py", "--resume_training", weights, "--dataset_path", "data", "--lr",
                      1e-2, "--batch_size", BATCH, "--epochs", 2, "--log_dir", "tuned",
                      "--retention", "colours", "旧的$x^", "--max_forgetting", 0.5,
                      "--wise_ft", 0, 0.25, 0.5, 0.75, 1, "--no_guard", cwd=work,
                      draws=True)  # fmt: skip
    return weights, next((work / "tuned").iterdir()), done.stdout


def scores_of_scripts(weights, work):
    """What the scripts for it say of weights on both sets."""
    common = ["--weights", weights, "--batch_size", BATCH, "--json", "scores.json"]
    run_script("utils/classification.py", *common, "--data", "colours", cwd=work)
    top1 = json.loads((work / "scores.json").read_text())["zero_shot"]["top1"]
    run_script("utils/metric.py", *common, "--dataset_path", "旧的$x^", "--language", "en",
               cwd=work)  # fmt: skip
    found = json.loads((work / "scores.json").read_text())
    return top1, np.mean([found[way][f"R@{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)])


@pytest.mark.slow
def test_the_scores_are_those_of_the_scripts_before_in_and_after_training(tuned, work):
    start, run, _ = tuned
    before, *epochs = read_rows(run / "metrics.csv")
    path = read_rows(run / "wise_ft.csv")
    columns = "retention_colours", "retention_旧的$x^"
    for row, weights in [
        (before, start),
        (epochs[-1], run / "weights" / "checkpoint.pth"),
        (path[-1], run / "weights" / "last_epoch_weights.pth"),
    ]:
        assert [row[c] for c in columns] == pytest.approx(scores_of_scripts(weights, work))
    assert all(len({row[c] for row in (before, *epochs, *path)}) > 1 for c in columns)


@pytest.mark.slow
def test_the_mixture_is_the_best_that_keeps_enough_and_the_curves_are_shown(tuned):
    _, run, printed = tuned
    before = read_rows(run / "metrics.csv")[0]
    path = read_rows(run / "wise_ft.csv")
    best = max((1, 2), key=lambda epoch: read_rows(run / "metrics.csv")[epoch]["mean_recall"])
    points = [(row["epoch"], row["alpha"]) for row in path]
    assert points[:5] == [(best, alpha) for alpha in (0, 0.25, 0.5, 0.75, 1)]
    assert points[5:] == ([(2, alpha) for alpha in (0.25, 0.5, 0.75, 1)] if best == 1 else [])
    names = [name for name in before if name.startswith("retention_")]
    for row in path:
        lost = sum(before[name] - row[name] for name in names) / 2
        assert row["points_lost"] == pytest.approx(lost, abs=1e-5)
    chosen = max((r for r in path if r["points_lost"] <= 0.5), key=lambda r: r["mean_recall"])
    assert f"at most 0.5 points (--max_forgetting), epoch {chosen['epoch']:g} at" in printed
    assert f"at alpha {chosen['alpha']:g}:" in printed
    tuned = "best_epoch" if chosen["epoch"] == best else "last_epoch"
    start, end, mixed = (
        torch.load(run / "weights" / f"{name}_weights.pth", weights_only=True)["visual.proj"]
        for name in ("start", tuned, "wise_ft")
    )
    torch.testing.assert_close(mixed.float(), start.float().lerp(end.float(), chosen["alpha"]),
                               rtol=1e-3, atol=1e-6)  # fmt: skip
    after = read_rows(run / "metrics.csv")[2]
    mean = (after["retention_colours"] + after["retention_旧的$x^"]) / 2
    (line,) = [line for line in printed.splitlines() if line.lstrip().startswith("2/2 ")]
    assert float(line.split()[6]) == pytest.approx(mean, abs=0.006)
    (line,) = [line for line in printed.splitlines() if line.startswith("before training ")]
    shown = [before[name] for name in ("mean_recall", "i2t_R@1", "t2i_R@1", *names)]
    assert line.split()[2:] == [f"{score:.2f}" for score in shown]
    report = (run / "report.html").read_text("utf-8")
    for name in ("colours", "旧的$x^"):
        assert f"{name} (retention) of the run by epoch" in report
    Image.open(run / "wise_ft.png").verify()


@pytest.mark.slow
def test_a_run_goes_on_with_its_sets_alone_wherever_they_lie(tuned, work, tmp_path):
    """From another folder, and after one of them has moved; a set that is gone is told at once."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(tuned[1], run)
    go_on = ["--resume_training", run, "--epochs", 3]
    for other in (["data"], ["colours", "旧的$x^", work / "data"]):
        line = error_line("train.py", *go_on, "--retention", *other, cwd=work)
        assert "--retention: a run goes on with sets that it has measured" in line
        assert "colours, 旧的$x^" in line
    moved = tmp_path / "elsewhere" / "colours"
    shutil.copytree(work / "colours", moved)
    shutil.copytree(work / "旧的$x^", data / "旧的$x^")
    both = [moved, data / "旧的$x^"]
    done = run_script("train.py", *go_on, "--retention", *both, cwd=tmp_path)
    assert " 3/3 " in done.stdout and "\n   start" not in done.stdout
    for row in read_rows(run / "metrics.csv"):
        assert {"retention_colours", "retention_旧的$x^"} <= row.keys()
    shutil.rmtree(moved)
    line = error_line("train.py", "--resume_training", run, "--epochs", 4, cwd=tmp_path)
    assert f"--retention {moved}: no such folder" in line


def measured(processes, work):
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    retention = Retention([str(work / "colours"), str(work / "旧的$x^")], ["en"], processes)
    loader = SimpleNamespace(
        batch_size=16, num_workers=0, captions_per_image=1, processes=processes
    )
    retention.prepare_for(model, loader, None)
    return retention.measure(model, processes)


@pytest.mark.slow
def test_several_processes_find_what_one_does(work):
    """Also where a set has fewer batches than there are processes."""
    shutil.rmtree(work / "colours" / ".cache", ignore_errors=True)
    found = in_processes(2, measured, work)
    assert found == [measured(ALONE, work)] * 2


@pytest.mark.parametrize(
    "name, template", [("ViT-demo", "a photo of a {}."), ("cn-demo", "一张{}的照片。")]
)
def test_a_set_of_classes_scores_its_zero_shot_top_1(work, name, template):
    """Image by image in float32, by the sentence of the model's language; classes are of different
    sizes."""
    torch.manual_seed(2)
    model = create_model(name).eval()
    retention = Retention([str(work / "colours")], ["en"])
    loader = SimpleNamespace(batch_size=16, num_workers=0, captions_per_image=1, processes=ALONE)
    retention.prepare_for(model, loader, None)
    files = sorted((work / "colours").rglob("*.png"))
    colours = sorted({file.parent.name for file in files})
    with torch.no_grad():
        pixels = torch.stack([model.preprocess(open_image(file)) for file in files])
        logits, _ = model(pixels, model.tokenize([template.format(c) for c in colours]))
    is_right = np.array(
        [colours[i] == file.parent.name for i, file in zip(logits.argmax(1), files, strict=True)]
    )
    found = retention.measure(model)
    assert 0 < is_right.mean() < 1
    assert found == {"retention_colours": pytest.approx(100 * is_right.mean())}
    lost = retention.compare(model, {"retention_colours": 50.0})["points_lost"]
    assert lost == pytest.approx(50 - 100 * is_right.mean(), abs=1e-5)


def test_captions_are_scored_in_float32(work):
    """Whatever the precision of training."""
    model = create_model("ViT-demo").eval()
    retention = Retention([str(work / "旧的$x^")], ["en"])
    loader = SimpleNamespace(batch_size=16, num_workers=0, captions_per_image=1, processes=ALONE)
    retention.prepare_for(model, loader, None)
    mixed, encode = [], model.encode_text
    model.encode_text = lambda *given, **options: (
        mixed.append(torch.is_autocast_enabled("cpu")) or encode(*given, **options)
    )
    retention.measure(model)
    assert mixed and not any(mixed)


def test_captions_are_in_the_languages_of_the_run_or_else_in_those_that_there_are(work, tmp_path):
    shutil.copytree(work / "旧的$x^", both := tmp_path / "both")
    shutil.copytree(both, chinese := tmp_path / "chinese")
    (chinese / "en_val.json").unlink()
    for folder, run, expected in (
        (both, ["en"], ["en"]), (both, ["cn", "en"], ["en", "cn"]), (chinese, ["en"], ["cn"]),
    ):  # fmt: skip
        (found,) = Retention([str(folder)], run).sets.values()
        assert found.text == Flickr8kDataset(folder, language=expected, split="val").text


def test_points_lost_are_how_much_lower_the_sets_score_now():
    before = {"mean_recall": 10.0, "retention_a": 60.1, "retention_b": 80.0}
    now = {"mean_recall": 90.0, "retention_a": 58.1, "retention_b": 70.0}
    assert points_lost(now, before) == 6 and points_lost(before, now) == -6
    assert points_lost({"retention_a": 58.1}, before) == 2


def test_every_set_has_a_name_of_its_own_that_can_be_printed():
    names = names_of(["a/宠物", "cifar10", "a\x1b\n"])
    assert names[:2] == ["宠物", "cifar10"] and all(name.isprintable() for name in names)
    with pytest.raises(InputError, match="two sets have the same name"):
        names_of(["a/宠物", "cifar10", "b/宠物/"])
