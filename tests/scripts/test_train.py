"""Runs of train.py on a small demo set, and the pieces it is made of."""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from definitions import by_definition
from PIL import Image
from script_runs import ROOT, error_line, run_script

from flickr8k import render_demo as render_demo_module
from flickr8k.render_demo import render_demo
from models import CLIP, load
from models.errors import InputError
from models.preprocess import open_image
from models.scripts import from_here
from utils.machine.processes import ALONE
from utils.training.settings import read_data

SCRATCH = ["--resume_training", "none", "--model", "ViT-demo", "--lr", "1e-3", "--batch_size", "16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=70, n_val=16)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def trained(data, work):
    """(run folder, what was printed) of four epochs from scratch."""
    arguments = ["--dataset_path", data, "--epochs", 4, "--freq", 2, "--log_dir", "logs"]
    done = run_script("train.py", *SCRATCH, *arguments, cwd=work, draws=True)
    (run,) = (work / "logs").iterdir()
    return run, done.stdout


def read_rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_files(trained):
    run, printed = trained
    weights = {path.name for path in (run / "weights").glob("*.pth")}
    kept = {re.sub(r"_loss.*", "", name) for name in weights}
    assert {"best_epoch_weights.pth", "last_epoch_weights.pth", "checkpoint.pth"} <= weights
    assert {"ep002", "ep004"} <= kept and len(weights) == 5
    assert len((run / "epoch_loss.txt").read_text().splitlines()) == 4
    for picture in ("epoch_loss.png", "R_mAP.png"):
        Image.open(run / picture).verify()
    report = (run / "report.html").read_text("utf-8")
    assert report.count("<article") == 16 + 80 and "loss of the run by epoch" in report
    assert printed.endswith(f" {(run / 'report.html').as_uri()}\n")
    (log,) = run.glob("console_*.log")
    assert "\n     4/4" in log.read_text("utf-8") and "\n     4/4" in printed
    assert json.loads((run / "arguments.json").read_text())["batch_size"] == 16


def test_tensorboard_reads_the_scores_of_each_epoch(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[0])).Reload()
    for name in ("mean_recall", "i2t_R@1", "t2i_mAP@10", "val_loss", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        rows = [(int(row["epoch"]), float(row[name])) for row in read_rows(trained[0])]
        assert [step for step, _ in found] == [epoch for epoch, _ in rows]
        assert [value for _, value in found] == pytest.approx([value for _, value in rows])


def test_metrics_csv_has_a_row_an_epoch(trained):
    rows = read_rows(trained[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    names = {f"{way}_{score}@{k}" for way in ("i2t", "t2i") for score in ("R", "mAP")
             for k in (1, 5, 10)}  # fmt: skip
    names |= {"train_loss", "val_loss", "lr", "images_per_second", "peak_memory_mb", "mean_recall"}
    names |= {"logit_scale"}
    for row in rows:
        assert names <= row.keys()
        assert all(math.isfinite(float(value)) for value in row.values())
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[0]["train_loss"]) < math.log(16) + 1


@pytest.fixture(scope="module")
def spoiled(trained, data, work):
    """(run folder, what was printed) of a run that starts from weights and spoils them: two epochs
    at a rate far too high, the second of which begins in a program of its own."""
    weights = trained[0] / "weights" / "best_epoch_weights.pth"
    done = run_script(
        "train.py", "--resume_training", weights, "--dataset_path", data, "--lr", 0.5,
        "--warmup_epochs", 0, "--batch_size", 16, "--epochs", 1, "--log_dir", "spoiled", cwd=work,
    )  # fmt: skip
    (run,) = (work / "spoiled").iterdir()
    first = done.stdout
    done = run_script("train.py", "--resume_training", run, "--epochs", 2, cwd=work)
    return run, first, done.stdout


@pytest.mark.slow
def test_the_scores_before_training_are_a_row_and_no_epoch(spoiled, trained):
    run, first, second = spoiled
    start, *epochs = read_rows(run)
    assert [row["epoch"] for row in (start, *epochs)] == ["0", "1", "2"]
    of_training = {"train_loss", "lr", "images_per_second", "data_wait_percent", "peak_memory_mb"}
    assert {name for name, value in start.items() if not value} == of_training
    assert all(math.isfinite(float(v)) for name, v in start.items() if name not in of_training)
    assert all(math.isfinite(float(value)) for row in epochs for value in row.values())
    # The weights are those of the best row of the run before, in float16.
    best = max(read_rows(trained[0]), key=lambda row: float(row["mean_recall"]))
    for name in ("val_loss", "logit_scale"):
        assert float(start[name]) == pytest.approx(float(best[name]), rel=1e-3)
    assert " 1/1 " in first and " 2/2 " in second and "\n   start" not in second
    losses = (run / "epoch_loss.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in losses] == ["Epoch 1", "Epoch 2"]


@pytest.mark.slow
def test_a_run_that_has_gained_nothing_stands_for_its_start_and_says_so(spoiled, trained):
    run, first, second = spoiled
    start, *epochs = (float(row["mean_recall"]) for row in read_rows(run))
    assert max(epochs) < start
    for printed in (first, second):
        assert "at alpha 0:" in printed and "it has gained nothing" in printed
    assert "back to the starting weights" in second and "back to" not in first
    assert "gained nothing" not in trained[1]


def test_logit_scale_is_the_factor_and_not_its_logarithm(trained):
    run, _ = trained
    weights = torch.load(run / "weights" / "last_epoch_weights.pth", weights_only=True)
    found = float(read_rows(run)[-1]["logit_scale"])
    assert found == pytest.approx(weights["logit_scale"].exp().item(), rel=1e-2)
    assert 1 < found <= 100


@pytest.mark.slow
def test_two_classes_as_captions_are_learned(data, work):
    """Every image's own caption is one that others have, too: recall moves all the same, and so
    does the best epoch."""
    classes = work / "classes"
    shutil.copytree(data, classes)
    for split in ("train", "val"):
        entries = json.loads((classes / f"en_{split}.json").read_text("utf-8"))
        for i, entry in enumerate(entries):
            entry["caption"] = ["red", "blue"][i % 2]
            Image.new("RGB", (64, 64), entry["caption"]).save(classes / entry["image"])
        (classes / f"en_{split}.json").write_text(json.dumps(entries), "utf-8")
    done = run_script("train.py", *SCRATCH, "--dataset_path", classes, "--epochs", 4, "--log_dir",
                      "of_classes", cwd=work)  # fmt: skip
    assert "86 captions (100.00%) belong to several images" in done.stdout
    (run,) = (work / "of_classes").iterdir()
    last = read_rows(run)[-1]
    assert float(last["i2t_R@1"]) == float(last["t2i_R@1"]) == 100
    assert float(last["train_loss"]) < 0.5


def test_best_weights_are_those_of_the_best_mean_recall(trained):
    run, _ = trained
    rows = read_rows(run)
    best = max(range(4), key=lambda i: float(rows[i]["mean_recall"]))
    contents = {
        name: torch.load(run / "weights" / name, weights_only=True)
        for name in ("best_epoch_weights.pth", "last_epoch_weights.pth")
    }
    assert all(t.dtype == torch.float16 for t in contents["best_epoch_weights.pth"].values())
    same = all(
        torch.equal(contents["best_epoch_weights.pth"][key], tensor)
        for key, tensor in contents["last_epoch_weights.pth"].items()
    )
    assert same == (best == 3)


def test_scoring_the_best_weights_gives_the_best_row(trained, data, work):
    run, _ = trained
    weights = run / "weights" / "best_epoch_weights.pth"
    done = run_script(
        "utils/metric.py", "--weights", weights, "--dataset_path", data,
        "--json", "scores/metrics.json", "--plot", "R_mAP.png", cwd=work,
    )  # fmt: skip
    metrics = json.loads((work / "scores" / "metrics.json").read_text())
    row = max(read_rows(run), key=lambda row: float(row["mean_recall"]))
    for way in ("i2t", "t2i"):
        for name in ("R@1", "R@5", "R@10"):  # float16 weights can move a close call
            assert metrics[way][name] == pytest.approx(float(row[f"{way}_{name}"]), abs=3)
            assert f"{metrics[way][name]:.2f}" in done.stdout
    assert Image.open(work / "R_mAP.png").format == "PNG"


@pytest.mark.slow
def test_the_weights_that_validation_chose_are_scored_on_the_test_split(trained, data, work):
    """Once, at the end, and under the name of the split."""
    shutil.copytree(data, tested := work / "tested")
    entries = json.loads((tested / "en_val.json").read_text("utf-8"))
    (tested / "en_val.json").write_text(json.dumps(entries[:6]), "utf-8")
    (tested / "en_test.json").write_text(json.dumps(entries[6:]), "utf-8")
    weights = trained[0] / "weights" / "best_epoch_weights.pth"
    done = run_script(
        "train.py", "--resume_training", weights, "--dataset_path", tested, "--epochs", 1,
        "--batch_size", 16, "--wise_ft", 0.3, "--log_dir", "of_test", cwd=work,
    )  # fmt: skip
    (run,) = (work / "of_test").iterdir()
    found = json.loads((run / "test_metrics.json").read_text())
    expected = scores_by_definition(run / "weights" / "wise_ft_weights.pth", tested, entries[6:])
    for way in ("i2t", "t2i"):
        assert found[way] == pytest.approx(expected[way])
    assert done.stdout.count("\ntest ") == 1 and "wise_ft_weights.pth on the test" in done.stdout
    assert done.stdout.count("\nvalidation ") == 1  # of the chosen weights; epochs have a line each
    start = run / "weights" / "start_weights.pth"
    before = scores_by_definition(start, tested, entries[6:])
    for way in ("i2t", "t2i"):
        assert found["before"][way] == pytest.approx(before[way])
    assert "plain_protocol" not in found  # no caption is shared
    low, high = found["intervals"]["gained"]["mean_recall"]
    assert low <= found["mean_recall"] - found["before"]["mean_recall"] <= high
    report = (run / "report.html").read_text("utf-8").replace("\n", "")
    report = re.sub(r" <small>[\d.]+ to [\d.]+</small>", "", report)  # intervals
    for scores in (found, found["before"]):
        cells = [f"<td>{scores['mean_recall']:.2f}</td>"]
        cells += [f"<td>{scores[way]['R@1']:.2f}</td>" for way in ("i2t", "t2i")]
        assert "".join(cells) in report
    assert "6 validation images, 10 test images" in done.stdout

    done = run_script("utils/metric.py", "--split", "test", "--weights", run, "--json", "test.json",
                      cwd=work)  # fmt: skip
    found = json.loads((work / "test.json").read_text())
    assert found["t2i"] == pytest.approx(expected["t2i"])
    assert "\ntest " in done.stdout and "10 images" in done.stdout


def scores_by_definition(weights, root, entries):
    model, preprocess = load(weights, "cpu")
    images = torch.stack([preprocess(open_image(root / entry["image"])) for entry in entries])
    texts = [caption for entry in entries for caption in entry["caption"]]
    with torch.inference_mode():
        logits, _ = model(images, model.tokenize(texts))
    having = {t: [i for i, e in enumerate(entries) if text in e["caption"]]
              for t, text in enumerate(texts)}  # fmt: skip
    right = {i: [t for t in having if i in having[t]] for i in range(len(entries))}
    return {"i2t": by_definition(logits, right, range(1, 11)),
            "t2i": by_definition(logits.T, having, range(1, 11))}  # fmt: skip


def test_a_test_split_is_that_of_all_languages(data, tmp_path):
    shutil.copytree(data, root := tmp_path / "data")
    shutil.copy(root / "en_val.json", root / "en_test.json")
    for languages, has_test in ((["en"], True), (["cn"], False), (["en", "cn"], False)):
        assert ("test" in read_data(root, languages, 2, ALONE)) == has_test


def test_a_run_goes_on_with_what_is_given_now(trained, work):
    """More epochs, another weight decay; a finished demo run goes on like any other."""
    run, _ = trained
    copy = work / "longer" / "run"
    shutil.copytree(run, copy)
    checkpoint = copy / "weights" / "checkpoint.pth"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"arguments": state["arguments"] | {"demo": True}}, checkpoint)
    given = ["--epochs", 5, "--weight_decay", 0.5]
    run_script("train.py", "--resume_training", checkpoint, *given, cwd=work)
    assert [row["epoch"] for row in read_rows(copy)] == ["1", "2", "3", "4", "5"]
    state = torch.load(checkpoint, weights_only=True)
    matrices, embeddings, others = state["optimizer"]["param_groups"]
    assert matrices["weight_decay"] == embeddings["weight_decay"] == 0.5
    assert others["weight_decay"] == 0


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--input_shape", "96"], "--input_shape"),
        (["--optimizer_type", "sgd"], "--optimizer_type"),
        (["--epochs", "3"], "has 4 epochs"),
    ],
)
def test_a_run_cannot_go_on_as_another(trained, work, arguments, named):
    checkpoint = trained[0] / "weights" / "checkpoint.pth"
    line = error_line("train.py", "--resume_training", checkpoint, *arguments, cwd=work)
    assert named in line


def test_a_checkpoint_away_from_its_run_is_not_continued(trained, work):
    shutil.copy(trained[0] / "weights" / "checkpoint.pth", work / "checkpoint.pth")
    line = error_line("train.py", "--resume_training", "checkpoint.pth", cwd=work)
    assert "RUN/weights/checkpoint.pth" in line


def say_that_it_compiles():
    CLIP.compile_towers = lambda model: print("compiled while training:", model.training)


@pytest.mark.slow
def test_fine_tuning_starts_from_weights_in_bfloat16_at_another_resolution(trained, data, work):
    weights = trained[0] / "weights" / "best_epoch_weights.pth"
    compiling = [] if sys.platform == "win32" else ["--compile"]
    done = run_script(
        "train.py", "--resume_training", weights, "--dataset_path", data, "--epochs", 1,
        "--warmup_epochs", 0.5, "--batch_size", 16, "--input_shape", 32, "--use_amp",
        "--optimizer_type", "sgd", "--lr", 1e-4, "--language", "cn", "--num_workers", 1,
        "--grad_checkpointing", "--cache", "pixels", "--log_dir", "tuned", "--distill", 6,
        *compiling, cwd=work, prepare=say_that_it_compiles,
    )  # fmt: skip
    if compiling:  # the model and the starting model of distillation
        assert done.stdout.count("compiled while training") == 2
    assert "\n   start" in done.stdout and "mixed, bfloat16" in done.stdout
    (run,) = (work / "tuned").iterdir()
    model, _ = load(run / "weights" / "best_epoch_weights.pth", "cpu")
    assert model.visual.input_resolution == 32
    assert {path.suffix for path in (work / "pixels").iterdir()} == {".pixels"}


def test_a_mistyped_start_is_told_before_missing_data(work):
    arguments = ["--resume_training", "ViT-B/33", "--dataset_path", "nowhere"]
    line = error_line("train.py", *arguments, cwd=work)
    assert "ViT-B/33: neither a file" in line and "did you mean ViT-B/32" in line


def test_no_data_says_what_to_do(work):
    line = error_line("train.py", "--dataset_path", "nowhere", cwd=work)
    for way_out in ("nowhere", "prepare.py --download", "--dataset_path", "--demo"):
        assert way_out in line


def test_both_splits_are_looked_for_before_anything_is_loaded(work):
    (work / "half").mkdir()
    (work / "half" / "en_train.csv").touch()
    line = error_line("train.py", "--dataset_path", "half", cwd=work)
    assert "half: no en_val.json in it, only en_train.csv" in line
    assert "--source FOLDER --output FOLDER; to see" in line
    line = error_line("train.py", "--dataset_path", "half", "--language", "cn", cwd=work)
    assert "half: no cn_train.json in it" in line
    assert "--source FOLDER --output FOLDER --language cn; to see" in line


def test_the_data_set_is_looked_for_beside_the_script(work, monkeypatch):
    """Where prepare.py writes it. Commands to type name the scripts as they are found from here."""
    arguments = ["--language", "cn", "--epochs", 1, "--warmup_epochs", 0]
    line = error_line("train.py", *arguments, cwd=work)
    assert f"{ROOT / 'flickr8k'}: no cn_train.json in it" in line
    assert f"python {ROOT / 'flickr8k' / 'prepare.py'} --download" in line
    line = error_line("train.py", *arguments, cwd=ROOT)
    assert "error: flickr8k: no cn_train.json in it" in line
    assert f"python {Path('flickr8k/prepare.py')} --download" in line
    for folder, found in ((ROOT, Path("a/b")), (work, ROOT / "a" / "b")):
        monkeypatch.chdir(folder)
        assert from_here("a/b") == found


def draw_nothing():
    """What an image of the demo shows."""
    render_demo_module.draw = lambda *_: Image.new("RGB", (64, 64))


def test_the_demo_goes_where_it_is_told_or_says_that_it_cannot(work):
    (work / "no_folder").touch()
    line = error_line("train.py", "--demo", "--dataset_path", "no_folder", cwd=work)
    assert "no_folder: cannot be written" in line
    given = ["--demo", "--dataset_path", "new", "--batch_size", 10_000]
    line = error_line("train.py", *given, cwd=work, prepare=draw_nothing)
    assert "2000 training images" in line
    assert (work / "new" / "cn_val.json").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(data, work):
    arguments = [*SCRATCH, "--dataset_path", data, "--log_dir", "burst", "--optimizer_type", "sgd"]
    line = error_line("train.py", *arguments, "--lr", "9e8", cwd=work)
    assert re.search(r"loss is nan at step \d+, learning rate .*--lr", line)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--resume_training", "none"], "--model"),
        (["--model", "ViT-demo"], "--resume_training none"),
        (["--batch_size", "1"], "--batch_size"),
        ([*SCRATCH, "--lock_image", "--lock_text"], "--lock_text 2"),
        ([*SCRATCH, "--lock_image", "4"], "this tower has 3 blocks"),
        ([*SCRATCH, "--grad_cache", "4", "--model", "RN50", "--input_shape", "32"], "--grad_cache"),
        (["--wise_ft", "2"], "from 0 to 1"),
        ([*SCRATCH, "--lora", "4"], "--resume_training WEIGHTS"),
        ([*SCRATCH, "--distill", "1"], "--resume_training WEIGHTS"),
        ([*SCRATCH, "--retention", "gone"], "--retention needs weights to start from"),
        (["--retention", "gone"], "--retention gone: no such folder, and no data set of"),
        (["--retention", "a_file"], "--retention a_file: is not a folder, and no data set of"),
        (["--retention", "a_folder"], "a_folder: "),
        (["--retention", " "], "--retention: the path is empty"),
        (["--max_forgetting", "-1"], "at least 0"),
        (["--lora", "0"], "from 1 to 1,024"),
        (["--language", "fr"], "cn"),
        ([*SCRATCH, "--stream", "1.tar", "--cache"], "--cache needs all images beforehand"),
        (["--dataset_path", "nowhere"], "nowhere: no such folder"),
        (["--lr", "0"], "--lr"),
        (["--demo", "--resume_training", "ViT-B/32"], "--demo"),
        (["--device", "quantum"], "--device"),
        (["--lr", "nan"], "--lr"),
        (["--epochs", "-1"], "--epochs"),
        (["--epochs", "9" * 400], "--epochs"),
        (["--input_shape", "1000000000"], "from 1 to 10,000"),
        (["--num_workers", "100000"], "from 0 to 256"),
        (["--device", "meta"], "--device meta: there is none here, only"),
        (["--momentum", "1"], "--momentum"),
        (["--optimizer_type", "lion"], "adamw"),
        ([*SCRATCH[:3], "ViT-B"], "ViT-demo"),
        (["--resume_training", "nothing.pth"], "nothing.pth"),
        ([*SCRATCH, "--batch_size", "71"], "--batch_size"),
        (["--batch_size", "71"], "--batch_size 71 is more than the 70"),
        ([*SCRATCH, "--input_shape", "50"], "--input_shape"),
        ([*SCRATCH, "--log_dir", "a_file"], "a_file: cannot be written"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, named, data, work):
    (work / "a_file").touch()
    (work / "a_folder").mkdir(exist_ok=True)
    assert named in error_line("train.py", "--dataset_path", data, *arguments, cwd=work)


def test_a_batch_larger_than_the_training_split_is_refused(data):
    with pytest.raises(InputError, match=r"71 is more than the 70"):
        read_data(data, ["en"], 71, ALONE)
    read_data(data, ["en"], 70, ALONE)
