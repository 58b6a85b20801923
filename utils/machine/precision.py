"""Number formats: float32, or mixed precision, whose weights are float32 as well."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.errors import InputError


@contextmanager
def tf32_products(are_allowed: bool) -> Iterator[None]:
    """Whether CUDA rounds the factors of float32 products to TF32, in a block or a function."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = are_allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Precision:
    """The number format of the forward pass, and the loss scale of backward pass and update.
    Products in float32 are exact outside `tf32_products`. Mixed precision is bfloat16 if the device
    has it, else float16 with a loss scale that keeps small gradients from vanishing (Micikevicius
    et al. 2018, section 3.2)."""

    def __init__(self, device: torch.device, use_amp: bool):
        has_bfloat16 = True
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8  # NVIDIA Ampere, AMD
        elif device.type == "mps":
            has_bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
            if use_amp and not has_bfloat16:
                raise InputError("--use_amp: a Mac's GPU needs macOS 14 for bfloat16; leave it out")
        # Other settings of a library, or torch's own for convolutions, end here.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self.device = device
        self.use_amp = use_amp
        is_scaled = use_amp and self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    @property
    def leaves_bfloat16(self) -> bool:
        """Whether it computes in float32 on a CPU with instructions for bfloat16 (AVX512-BF16)."""
        has_products = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return self.device.type == "cpu" and not self.use_amp and has_products()

    def __str__(self) -> str:
        if self.use_amp:
            return f"mixed, {self.dtype}".replace("torch.", "")
        return "float32, TF32 products" if self.device.type == "cuda" else "float32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.use_amp)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the parameters'; in float16, times the loss scale."""
        self.scaler.scale(loss).backward()

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """One step of the optimizer, with gradients clipped to a norm of `max_norm`."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()  # now, since the next activations need the memory
