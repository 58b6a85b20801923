"""The device that computes: the CPU, a GPU with CUDA, or a Mac's (`mps`, which is not tested)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.errors import InputError


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default CUDA if there is a GPU, else `mps` on a Mac that has it,
    else the CPU. Raises `InputError` for a device that does not exist here."""
    gpus = torch.cuda.device_count()
    here = ["cuda", *(f"cuda:{number}" for number in range(gpus))] if gpus else []
    here += ["mps", "mps:0"] if torch.backends.mps.is_available() else []
    here.append("cpu")
    name = here[0] if device is None else str(device)
    if name not in here:
        raise InputError(f"--device {name}: there is none here, only {', '.join(here)}; for a GPU "
                         "of NVIDIA install a torch built for CUDA")  # fmt: skip
    return torch.device(name)


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, moved to the device. Raises `InputError` if its memory is full."""
    try:
        return model.to(device)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise InputError(
            f"the memory of {device} is too full for the model: end other programs there, or take "
            "another --device or a smaller model"
        ) from error


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device. The CPU does not wait for CUDA, which reads pinned memory; for `mps`
    it does, because torch could read freed memory (pytorch issue 189690)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def download(number: Tensor) -> Callable[[], float]:
    """A function that returns the number, and waits on CUDA for no later work of the GPU."""
    if number.device.type != "cuda":
        return number.item
    copy, is_there = number.to("cpu", non_blocking=True), torch.cuda.Event()
    is_there.record()

    def value() -> float:
        is_there.synchronize()
        return copy.item()

    return value
