"""The device that computes: the CPU, a GPU with CUDA, or the GPU of a Mac (Apple's `mps`).

`mps` follows torch's documentation and its list of known faults; it has not been tried on a Mac.
"""

import torch
from torch import Tensor

from models.errors import InputError


def devices_here() -> list[str]:
    """The names of the devices that exist here, the fastest first."""
    here = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        here.append("mps")
    return [*here, "cpu"]


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default CUDA if there is a GPU, else `mps` on a Mac that has it,
    else the CPU. Raises `InputError`, which names the devices that exist here, for any other."""
    here = devices_here()
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
    if picked.type == "cuda":
        found = f"cuda:{picked.index or 0}" in here
    else:
        found = picked.type in here and not picked.index
    if not found:
        build = ", or install a torch built for CUDA" if picked.type == "cuda" else ""
        raise InputError(f"--device {device}: there is none here, only {', '.join(here)}; use one "
                         f"of these{build}")  # fmt: skip
    return picked


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device. The CPU does not wait for a CUDA GPU, which reads pinned memory; for
    `mps` it must, since torch could read the tensor after its memory has been given away (pytorch
    issue 189690)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
