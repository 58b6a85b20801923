"""Batches on their way from worker processes, and workers that do not deliver."""

import ctypes
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from script_runs import forks, run_script, start_script

from flickr8k.render_demo import render_demo
from models import progress_bar
from models.clip_utils import create_model
from models.errors import InputError
from utils import Flickr8kDataset
from utils.data import image_batches
from utils.data.image_batches import Loaded, collate, read_batches
from utils.machine import interrupt, memory

SCRATCH = ["--resume_training", "none", "--model", "ViT-tiny", "--batch_size", "8", "--epochs", "1",
           "--num_workers", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=24, n_val=4)


@given(workers=st.integers(1, 64), batch=st.integers(1, 9), lacking=st.integers(-1, 1))
def test_shared_memory_is_used_if_two_batches_of_every_worker_fit(workers, batch, lacking):
    images = torch.randint(256, (batch, 3, 4, 4), dtype=torch.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            image_batches, "get_worker_info", lambda: SimpleNamespace(num_workers=workers)
        )
        room = 2 * workers * batch * 3 * 4 * 4 - lacking
        patch.setattr(image_batches, "free_shared_memory", lambda: room)
        handed = collate(Loaded(images.clone(), [0], {}))
    assert np.array_equal(np.asarray(handed.images), images)
    if lacking > 0:
        assert isinstance(handed.images, np.ndarray)
    else:
        assert handed.images.is_shared()


def test_a_batch_that_finds_no_room_at_the_last_moment_goes_through_the_pipe(monkeypatch):
    def full(_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(image_batches, "get_worker_info", lambda: SimpleNamespace(num_workers=1))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    handed = collate(Loaded(torch.ones(2, 3), [0], {}))
    assert isinstance(handed.images, np.ndarray) and (handed.images == 1).all()


def test_errors_and_batches_without_workers_are_left_as_they_are():
    error, loaded = InputError("bad"), Loaded(torch.ones(1), [0], {})
    assert collate(error) is error and collate(loaded) is loaded


def test_where_there_is_no_limit_of_its_own_nothing_is_known_of_shared_memory(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(memory, "SHARED_MEMORY", str(tmp_path / "absent"))
    assert memory.free_shared_memory() is None
    if sys.platform != "win32":
        monkeypatch.setattr(memory, "SHARED_MEMORY", str(tmp_path))
        assert 0 < memory.free_shared_memory() < 2**60


@pytest.mark.skipif(
    multiprocessing.get_all_start_methods()[0] != "fork",
    reason="the workers are to inherit a patch",
)
def test_batches_through_pipes_are_those_of_the_data_set(data, monkeypatch):
    monkeypatch.setattr(image_batches, "free_shared_memory", lambda: 0)
    dataset = Flickr8kDataset(data, 32)
    batches = [[0, 5, 2], [7, 1], [3]]
    for rows, loaded in zip(batches, read_batches(dataset.reader, batches, 2), strict=True):
        assert loaded.rows == rows
        assert torch.equal(loaded.images, torch.stack([dataset[row][0] for row in rows]))


@pytest.mark.parametrize("language, model", [("en", "ViT-demo"), ("cn", "cn-demo")])
def test_what_a_worker_is_sent_is_paths_and_little_more(data, language, model):
    """Where workers are no forks, it is pickled."""
    dataset = Flickr8kDataset(data, language=language, model=create_model(model))
    assert len(dataset.tokens) == len(dataset.text)  # the tokenizer is there, and has worked
    sent = pickle.dumps(dataset.reader)
    assert len(sent) < len(pickle.dumps(dataset.image)) + 1000
    assert torch.equal(pickle.loads(sent)[0], dataset[0][0])


def small_shared_memory():
    """Make this process one for which /dev/shm holds 256 kB."""
    user, group = os.getuid(), os.getgid()
    new_user_and_mounts = 0x10000000 | 0x20000
    if ctypes.CDLL(None).unshare(new_user_and_mounts):
        raise OSError("no right to do so")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "/dev/shm"]
    subprocess.run(mount, check=True, capture_output=True)
    assert shutil.disk_usage("/dev/shm").total == 2**18


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no /dev/shm")
def test_a_run_ends_well_with_little_shared_memory(data, tmp_path):
    """A batch takes 393 kB here."""
    probe = forks().Process(target=small_shared_memory)
    probe.start()
    probe.join()
    if probe.exitcode:
        pytest.skip("no right to mount a small /dev/shm")
    done = run_script("train.py", *SCRATCH, "--dataset_path", data, "--input_shape", 128,
                      cwd=tmp_path, prepare=small_shared_memory)  # fmt: skip
    assert "best_epoch_weights.pth:" in done.stdout


class Stuck(list):
    def __getitem__(self, row):
        time.sleep(60)


def wait_for_workers_that_do_not_deliver():
    """As when a disk in the network has gone."""
    progress_bar.INTERVAL, interrupt.ONE_SIGNAL = 0, 0.2
    image_batches.ImageReader.__getitem__ = Stuck.__getitem__


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_run_that_waits_for_data_ends_on_a_second_sigterm(data, tmp_path):
    errors = tmp_path / "errors"
    process = start_script(
        "train.py", *SCRATCH, "--dataset_path", data, cwd=tmp_path,
        streams=(os.devnull, os.devnull, errors), prepare=wait_for_workers_that_do_not_deliver,
    )  # fmt: skip
    while not (errors.exists() and "epoch 1:" in errors.read_text("utf-8")):
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(1)  # until it waits
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
    process.join(30)
    assert process.exitcode == 130
    printed = errors.read_text("utf-8")
    assert "interrupted" in printed and "Traceback" not in printed
