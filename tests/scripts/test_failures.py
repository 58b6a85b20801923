"""What ends a run though nothing is wrong with it: full disks, full memory, killed processes."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from script_runs import error_line, run_script

from flickr8k.render_demo import render_demo
from models.errors import InputError
from utils.data import image_batches
from utils.machine.memory import IN_TRAINING, explained
from utils.runs.folder import new_run_folder

SCRATCH = ["--resume_training", "none", "--model", "ViT-tiny", "--batch_size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=16, n_val=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of one epoch."""
    cwd = tmp_path_factory.mktemp("work")
    run_script("train.py", *SCRATCH, "--dataset_path", data, "--epochs", 1, cwd=cwd)
    return next((cwd / "logs").iterdir())


def limit_files():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_stops_the_run_and_leaves_its_files_as_they_were(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    names = ("checkpoint.pth", "last_epoch_weights.pth", "best_epoch_weights.pth")
    before = {name: (copy / "weights" / name).read_bytes() for name in names}
    line = error_line(
        "train.py", "--resume_training", copy, "--epochs", 2, cwd=tmp_path, prepare=limit_files
    )
    assert "_weights.pth: cannot be written" in line and "Make room" in line
    assert {name: (copy / "weights" / name).read_bytes() for name in names} == before
    assert not list(copy.glob("weights/.*"))
    run_script("train.py", "--resume_training", copy, "--epochs", 2, cwd=tmp_path)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_before_anything_is_changed(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    checkpoint = copy / "weights" / "checkpoint.pth"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"model": {}}, checkpoint)
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    line = error_line("train.py", "--resume_training", copy, cwd=tmp_path)
    assert f"{checkpoint}: " in line
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="nothing is read-only to the superuser"
)
def test_a_read_only_log_folder_is_found_before_training(data, tmp_path):
    (tmp_path / "logs").mkdir(mode=0o555)
    line = error_line("train.py", *SCRATCH, "--dataset_path", data, cwd=tmp_path)
    assert "logs: cannot be written" in line


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    folders = [new_run_folder(tmp_path, "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now_2", "now_3"]
    assert all((folder / "weights").is_dir() for folder in folders)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on memory")
def test_memory_that_is_full_names_the_arguments_that_help():
    with pytest.raises(InputError) as error, explained(IN_TRAINING):
        torch.empty(2**50)
    for argument in ("--batch_size", "--grad_cache", "--use_amp", "--resume_training"):
        assert argument in str(error.value)
    errors = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    for status in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"):
        errors.append(RuntimeError(f"CUDA error: {status} when calling `create(handle)`"))
    for full in errors:
        with pytest.raises(InputError, match="--grad_cache"), explained(IN_TRAINING):
            raise full
    with pytest.raises(RuntimeError, match="a bug"), explained():
        raise RuntimeError("a bug")


def kill_workers():
    """When they read an image."""

    def open_image(*image):
        if image_batches.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*image)

    read, image_batches.open_image = image_batches.open_image, open_image


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_killed_worker_ends_the_run_with_one_line(data, tmp_path):
    """As the system kills a process when memory is full."""
    line = error_line(
        "train.py", *SCRATCH, "--dataset_path", data, "--num_workers", 1, cwd=tmp_path,
        prepare=kill_workers,
    )  # fmt: skip
    assert "was killed" in line and "--num_workers" in line


def test_strict_lists_the_bad_images_of_both_splits(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    entries = {
        split: json.loads((copy / f"en_{split}.json").read_text()) for split in ("train", "val")
    }
    bad = [entries["train"][3]["image"], entries["train"][5]["image"], entries["val"][1]["image"]]
    for image in bad:
        (copy / image.replace("\\", "/")).write_bytes(b"")
    done = run_script(
        "train.py", *SCRATCH, "--dataset_path", copy, "--strict", cwd=tmp_path, code=2
    )
    assert "Traceback" not in done.stderr and "3 images cannot be read" in done.stderr
    for image in bad:
        assert image.replace("\\", "/").split("/")[-1] in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_bad_training_image_is_named_and_the_run_goes_on_or_stops_if_strict(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    image = json.loads((copy / "en_train.json").read_text())[3]["image"].replace("\\", "/")
    (copy / image).write_bytes(b"")
    arguments = [*SCRATCH, "--dataset_path", copy, "--epochs", 2]
    done = run_script("train.py", *arguments, cwd=tmp_path)
    assert done.stdout.count(f"{image.split('/')[-1]}: ") == 1
    assert "another image takes its place" in done.stdout and " 2/2 " in done.stdout
    done = run_script("train.py", *arguments, "--strict", cwd=tmp_path, code=2)
    assert f"error: 1 images cannot be read:\n  {copy / image}: " in done.stderr


def test_images_in_both_splits_are_warned_of(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    entries = json.loads((copy / "en_train.json").read_text())
    extra = json.loads((copy / "en_val.json").read_text())[:2]
    (copy / "en_train.json").write_text(json.dumps(entries + extra))
    done = run_script("train.py", *SCRATCH, "--dataset_path", copy, "--epochs", 1, cwd=tmp_path)
    assert "warning: 2 images are in both training and validation" in done.stdout
