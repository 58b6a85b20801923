"""Devices by name. A Mac's GPU is not here: what torch says of it is replaced."""

import pytest
import torch

from models.clip_utils import load
from models.device import moved, pick_device, upload
from models.errors import InputError
from utils.machine.memory import (
    IN_TRAINING,
    explained,
    peak_memory_mb,
)
from utils.machine.precision import Precision
from utils.machine.processes import join_processes

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.fixture
def machine(monkeypatch):
    """A function that makes torch find so many GPUs with CUDA, and a Mac's GPU or none."""

    def make(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


@pytest.mark.parametrize(
    "gpus, mps, default", [(0, False, "cpu"), (2, False, "cuda"), (0, True, "mps")]
)
def test_the_default_is_a_gpu_where_there_is_one(machine, gpus, mps, default):
    machine(gpus, mps)
    assert pick_device() == torch.device(default)
    assert pick_device("cpu") == pick_device(CPU) == CPU


def test_devices_that_are_here_are_taken(machine):
    machine(2, True)
    for name in ("cuda", "cuda:0", "cuda:1", "mps", "mps:0", "cpu"):
        assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["meta", "xpu", "hpu", "vulkan", "gpu", "", "cuda:-1", "cpu:x"])
def test_names_of_no_device_are_refused_with_those_that_exist_here(machine, name):
    machine(1, False)
    with pytest.raises(InputError, match=f"^--device {name}: .*, only cuda, cuda:0, cpu; "):
        pick_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:2", "mps", "cpu:1"])
def test_devices_that_are_not_here_are_refused(machine, name):
    machine(2 if name == "cuda:2" else 0, False)
    with pytest.raises(InputError, match=f"^--device {name}: there is none here, only .*cpu; "):
        pick_device(name)
    with pytest.raises(InputError, match="there is none here"):
        load("ViT-B/32", name)  # before anything is downloaded


def test_several_processes_do_not_share_a_macs_gpu(machine, monkeypatch):
    machine(0, True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match=r"^--device mps: .* --device cpu"):
        join_processes("mps")
    monkeypatch.setattr("utils.machine.processes.dist.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("utils.machine.processes.dist.get_rank", lambda: 0)
    monkeypatch.setattr("sys.excepthook", None)
    assert join_processes(None)[1] == CPU


@pytest.mark.parametrize("device, waits", [("cpu", True), ("mps", True), ("cuda", False)])
def test_the_copy_to_a_device_is_waited_for_unless_it_has_cuda(monkeypatch, device, waits):
    asked, pinned = [], torch.ones(1)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: asked.append((*a, k)))
    tensor = torch.zeros(1)
    upload(tensor, torch.device(device))
    ((copied, to, how),) = asked
    assert copied is (tensor if waits else pinned)
    assert (to, how) == (torch.device(device), {"non_blocking": not waits})


def test_mixed_precision_of_a_mac_is_bfloat16_or_refused(monkeypatch):
    asked = []

    def is_newer(*version):
        asked.append(version)
        return newer

    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", is_newer)
    newer = True
    precision = Precision(MPS, use_amp=True)
    assert str(precision) == "mixed, bfloat16" and not precision.scaler.is_enabled()
    newer = False
    with pytest.raises(InputError, match=r"^--use_amp: .* macOS 14"):
        Precision(MPS, use_amp=True)
    assert str(Precision(MPS, use_amp=False)) == "float32"
    assert set(asked) == {(14, 0)}


def test_the_memory_of_a_macs_gpu_is_what_torch_has_reserved(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    assert peak_memory_mb(MPS) == 5
    with pytest.raises(InputError, match="--grad_cache"), explained(IN_TRAINING):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 18.04 GB, max allowed: ...)")


def test_a_model_that_no_memory_is_left_for_is_refused(monkeypatch):
    messages = ["CUDA error: out of memory", "CUDA out of memory. Tried to allocate", "a bug"]

    def fail(*_):
        raise RuntimeError(messages.pop(0))

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    for _ in range(2):
        with pytest.raises(InputError, match=r"^the memory of cpu is too full for the model"):
            moved(torch.nn.Identity(), CPU)
    with pytest.raises(RuntimeError, match="a bug"):
        moved(torch.nn.Identity(), CPU)
