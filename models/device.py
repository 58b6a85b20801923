"""The device that computes: the CPU, a GPU with CUDA, or the GPU of a Mac (Apple's `mps`).

`mps` follows torch's documentation and its list of known faults; no Mac was available for a test.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.errors import InputError


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default CUDA if there is a GPU, else `mps` on a Mac that has it,
    else the CPU. Raises `InputError` for a device that does not exist here."""
    here = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        here.append("mps")
    here.append("cpu")
    if device is None:
        return torch.device(here[0].partition(":")[0])
    try:
        picked = torch.device(device)
    except (RuntimeError, ValueError):
        picked = None
    if picked is None or picked.type not in ("cuda", "mps", "cpu"):
        raise InputError(
            f"--device {device}: no such device; it is cuda, mps or cpu, and here there are "
            f"{', '.join(here)}"
        )
    name = f"cuda:{picked.index or 0}" if picked.type == "cuda" else picked.type
    if name not in here or (picked.type != "cuda" and picked.index):
        build = ", or install a torch built for CUDA" if picked.type == "cuda" else ""
        raise InputError(f"--device {device}: there is none here, only {', '.join(here)}; use one "
                         f"of these{build}")  # fmt: skip
    return picked


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
    """`tensor` on the device. The CPU does not wait for a CUDA GPU, which reads pinned memory. It
    waits for `mps`, because torch could read the tensor after its memory was freed (pytorch issue
    189690)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def download(number: Tensor) -> Callable[[], float]:
    """A function that returns the number, once its device has computed it. On CUDA, what is asked
    of the GPU after `download` is not waited for."""
    if number.device.type != "cuda":
        return number.item
    copy, is_there = number.to("cpu", non_blocking=True), torch.cuda.Event()
    is_there.record()

    def value() -> float:
        is_there.synchronize()
        return copy.item()

    return value
