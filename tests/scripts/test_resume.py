"""Runs that are stopped at any moment and go on to what they would have been."""

import csv
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import open_clip
import pytest
import torch
from caption_files import write_tar
from open_clip_folders import siglip
from PIL import Image
from script_runs import error_line, printed_by, run_script, start_script

import predict_zero_shot
from flickr8k.render_demo import render_demo
from models import convert, progress_bar
from utils.machine.interrupt import Interrupt

KILLS = 12
TIMES = {"images_per_second", "data_wait_percent", "peak_memory_mb"}  # what no two runs share
ARGUMENTS = ["--resume_training", "none", "--model", "ViT-tiny", "--lr", "1e-3", "--epochs", "3",
             "--batch_size", "4", "--captions_per_image", "2", "--ema", "0.9", "--patience", "5",
             "--save_steps", "1", "--freq", "2"]  # fmt: skip


def show_every_step():
    """And get the signals of a terminal together with the workers."""
    os.setsid()
    progress_bar.INTERVAL = 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=66, n_val=8)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing stops."""
    cwd = tmp_path_factory.mktemp("whole")
    run_script("train.py", *ARGUMENTS, "--dataset_path", data, cwd=cwd)
    (run,) = (cwd / "logs").iterdir()
    return run


def wait_for_saves(process, checkpoint, saves):
    """Wait until the checkpoint has been written so many times, or the process has ended."""
    seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while saves and process.is_alive():
        now = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        saves -= now != seen
        seen = now
        time.sleep(0.002)


def assert_same_run(run, whole):
    def rows(folder):
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            return [
                {k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)
            ]

    def content(folder, name):
        return torch.load(folder / "weights" / name, weights_only=True)

    assert rows(run) == rows(whole)
    assert (run / "epoch_loss.txt").read_text() == (whole / "epoch_loss.txt").read_text()
    names = {path.name for path in (whole / "weights").glob("*.pth")}
    assert {path.name for path in (run / "weights").glob("*.pth")} == names
    for name in names - {"checkpoint.pth"}:
        found, expected = content(run, name), content(whole, name)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    found, expected = content(run, "checkpoint.pth"), content(whole, "checkpoint.pth")
    for part in ("model", "average"):
        for key, tensor in expected[part].items():
            assert torch.equal(found[part][key], tensor), (part, key)
    for number, state in expected["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(found["optimizer"]["state"][number][key], value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_one_that_was_not(data, whole, tmp_path):
    moments = random.Random(0)
    process = start_script("train.py", *ARGUMENTS, "--dataset_path", data, cwd=tmp_path)
    while not (runs := list(tmp_path.glob("logs/*/weights"))):
        time.sleep(0.002)
    run = runs[0].parent
    checkpoint = run / "weights" / "checkpoint.pth"
    wait_for_saves(process, checkpoint, 1)
    process.kill()
    process.join()
    kills = 1
    while True:
        workers = moments.choice([0, 0, 1])
        process = start_script(
            "train.py", "--resume_training", checkpoint, "--num_workers", workers, cwd=tmp_path
        )
        if kills < KILLS:
            # Before, between and while files are written; now and then before the first step.
            wait_for_saves(process, checkpoint, moments.randrange(4))
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        process.join()
        if kills >= KILLS:
            break
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed"
        kills += 1
    assert process.exitcode == 0
    assert list((tmp_path / "logs").iterdir()) == [run]
    assert (run / "R_mAP.png").exists()
    assert_same_run(run, whole)


def whole_and_stopped(arguments, cwd):
    """The folders of two runs: one that nothing stops, and one that is killed after its second
    checkpoint and goes on."""
    run_script("train.py", *arguments, "--log_dir", "one", cwd=cwd)
    process = start_script("train.py", *arguments, "--log_dir", "two", cwd=cwd)
    while not (runs := list(cwd.glob("two/*/weights"))):
        assert process.is_alive()
        time.sleep(0.002)
    wait_for_saves(process, runs[0] / "checkpoint.pth", 2)
    assert process.is_alive()
    process.kill()
    process.join()
    run_script("train.py", "--resume_training", runs[0].parent, cwd=cwd)
    return next((cwd / "one").iterdir()), runs[0].parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_a_chinese_model_goes_on_bit_for_bit(data, tmp_path):
    arguments = ["--resume_training", "none", "--model", "cn-tiny", "--language", "cn", "en",
                 "--dataset_path", data, "--epochs", 2, "--batch_size", 22, "--save_steps", 1,
                 "--lock_text", 1, "--ema", 0.9]  # fmt: skip
    one, two = whole_and_stopped(arguments, tmp_path)
    assert_same_run(two, one)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_a_stream_goes_on_with_the_samples_not_yet_seen(data, tmp_path):
    """And so bit for bit, with as many workers."""
    pytest.importorskip("webdataset")
    entries = json.loads((data / "en_train.json").read_text())
    for shard in range(3):
        members = {}
        for number, entry in enumerate(entries[shard::3]):
            members[f"{number}.png"] = (data / entry["image"]).read_bytes()
            members[f"{number}.json"] = json.dumps(entry).encode()
        write_tar(tmp_path / f"{shard}.tar", members)
    stream = ["--stream", "{0..2}.tar", "--num_workers", 1, "--epochs", 2]
    one, two = whole_and_stopped([*ARGUMENTS, "--dataset_path", data, *stream], tmp_path)
    assert_same_run(two, one)
    assert "--stream: after as many samples" in max(two.glob("console_*")).read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_a_siglip_goes_on_bit_for_bit_and_gives_each_label_a_probability_of_its_own(data, tmp_path):
    """From a folder that is gone before it is used: a run has all that its weights need."""
    siglip(tmp_path / "start")
    arguments = ["--resume_training", "start", "--dataset_path", data, "--epochs", 2, "--lr", 1e-3,
                 "--batch_size", 22, "--save_steps", 1, "--lock_image", 2, "--grad_cache", 8,
                 "--layer_decay", 0.9, "--wise_ft", 0, 0.5, 1, "--ema", 0.9]  # fmt: skip
    one, two = whole_and_stopped(arguments, tmp_path)
    assert_same_run(two, one)
    assert (two / "wise_ft.csv").read_bytes() == (one / "wise_ft.csv").read_bytes()
    shutil.rmtree(tmp_path / "start")
    printed_by(convert.main, two, "out", "--format", "open_clip", cwd=tmp_path)
    place, image = f"local-dir:{tmp_path / 'out'}", next((data / "images").iterdir())
    labels = ["a red star", "two boats"]
    said = printed_by(predict_zero_shot.main, image, "--weights", two, "--labels", *labels,
                      cwd=tmp_path)  # fmt: skip
    model, transform = open_clip.create_model_from_pretrained(place)
    tokens = open_clip.get_tokenizer(place)(labels)
    with torch.no_grad():
        logits, _ = model.eval().get_logits(transform(Image.open(image))[None], tokens)
    printed = re.search(r"\[\[(.*)\]\]", said)[1].split()
    assert [float(p) for p in printed] == pytest.approx(logits[0].sigmoid().tolist(), rel=1e-4)
    assert "they need not add up to 1" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_low_rank_changes_near_the_start_go_on_bit_for_bit_and_are_saved_plain(
    data, whole, tmp_path
):
    start = whole / "weights" / "best_epoch_weights.pth"
    for colour in ("red", "blue"):
        (tmp_path / "颜色" / colour).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "颜色" / colour / "1.png")
    arguments = ["--resume_training", start, "--dataset_path", data, "--lora", 2, "--distill", 5,
                 "--ema", 0.9, "--lr", 1e-2, "--epochs", 2, "--batch_size", 22, "--grad_cache", 8,
                 "--save_steps", 1, "--wise_ft", 0, 1, "--retention", "颜色", data]  # fmt: skip
    one, two = whole_and_stopped(arguments, tmp_path)
    assert_same_run(two, one)
    assert (two / "wise_ft.csv").read_bytes() == (one / "wise_ft.csv").read_bytes()
    assert "retention_颜色" in (two / "metrics.csv").read_text("utf-8")
    plain = torch.load(start, weights_only=True)
    for file in two.glob("weights/*_weights.pth"):
        assert torch.load(file, weights_only=True).keys() == plain.keys()
    best = torch.load(two / "weights" / "best_epoch_weights.pth", weights_only=True)
    changed = {name for name in plain if not torch.equal(best[name], plain[name])}
    assert {name.split(".")[-2] for name in changed} <= {"attn", "out_proj", "c_fc", "c_proj"}
    assert len(changed) == 2 * 2 * 4  # in two blocks of two towers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_names_the_command_that_goes_on(
    data, whole, tmp_path, number
):
    arguments = [a for a in ARGUMENTS if a not in ("--save_steps", "1")]
    printed, errors = tmp_path / "printed", tmp_path / "errors"
    process = start_script(
        "train.py", *arguments, "--dataset_path", data, "--num_workers", 1, cwd=tmp_path,
        streams=(os.devnull, printed, errors), prepare=show_every_step,
    )  # fmt: skip
    while not (errors.exists() and re.search(r"epoch 1: +[1-9]", errors.read_text("utf-8"))):
        assert process.is_alive()
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal does it: the workers get it, too
    process.join(60)
    assert process.exitcode == 128 + number, errors.read_text("utf-8")
    assert "Traceback" not in errors.read_text("utf-8")
    path = re.search(r"/train\.py --resume_training (\S+)", printed.read_text("utf-8"))[1]
    state = torch.load(tmp_path / path / "weights" / "checkpoint.pth", weights_only=True)
    assert 0 < len(state["losses"]) <= 16
    run_script("train.py", "--resume_training", path, cwd=tmp_path)
    (run,) = (tmp_path / "logs").iterdir()
    assert_same_run(run, whole)


@pytest.mark.slow
def test_a_run_that_has_ended_says_so(whole, tmp_path):
    done = run_script("train.py", "--resume_training", whole, cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "finished" in line]
    assert "all 3 epochs" in line and "nothing is trained" in line and "--epochs" in line
    assert " 3/3 " not in done.stdout


@pytest.mark.slow
def test_a_checkpoint_of_another_version_says_so(whole, tmp_path):
    state = torch.load(whole / "weights" / "checkpoint.pth", weights_only=True)
    for version in (state["format"] - 1, state["format"] + 1):
        torch.save(state | {"format": version}, tmp_path / "checkpoint.pth")
        line = error_line("train.py", "--resume_training", "checkpoint.pth", cwd=tmp_path)
        assert "checkpoint.pth" in line and f"format {version}" in line


@pytest.mark.slow
def test_in_the_middle_of_an_epoch_the_batches_cannot_change(whole, tmp_path):
    state = torch.load(whole / "weights" / "checkpoint.pth", weights_only=True)
    torch.save(state | {"losses": [1.0]}, tmp_path / "checkpoint.pth")
    changes = (["--batch_size", 8], ["--seed", 3], ["--captions_per_image", 1], ["--no_augment"])
    for changed in changes:
        line = error_line("train.py", "--resume_training", "checkpoint.pth", *changed, cwd=tmp_path)
        assert changed[0] in line


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_data_alone_wherever_they_lie(data, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    arguments = ["--resume_training", run, "--epochs", 4, "--patience", 9]
    for changed in (["--language", "cn"], ["--language", "en", "cn"]):
        line = error_line("train.py", *arguments, *changed, cwd=tmp_path)
        assert "--language" in line and "best_epoch_weights.pth" in line
    run_script("train.py", *arguments, "--dataset_path", "moved", cwd=tmp_path)
    found = json.loads((run / "arguments.json").read_text())
    assert found["dataset_path"] == str(moved.resolve())
    started = json.loads((whole / "arguments.json").read_text())
    for name in ("model", "resume_training"):
        assert found[name] == started[name] is not None
    entries = json.loads((moved / "en_train.json").read_text("utf-8"))
    (moved / "en_train.json").write_text(json.dumps(entries[:-1]), "utf-8")
    line = error_line("train.py", "--resume_training", run, "--epochs", 5, cwd=tmp_path)
    assert "--dataset_path" in line


def test_signals_are_noted_until_they_are_released():
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    interrupt = Interrupt()
    try:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupt.release()
    assert handlers() == before
