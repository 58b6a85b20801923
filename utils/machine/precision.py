"""Number formats: float32, or mixed precision, whose weights are float32 as well."""

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import InputError
from models.weights.config import Config

WORTH_A_HINT = 1.2  # times as fast in bfloat16 as in float32
ROWS = 128  # tokens that a layer is timed with; a step has more, and gains rather more
ROUNDS = 9
LONGEST = 0.1  # seconds, after which no other round starts


class Precision:
    """How numbers are rounded in the forward pass, the backward pass and the update.

    Mixed precision is bfloat16 where the device computes in it, else float16 with a loss scale
    that keeps small gradients from vanishing (Micikevicius et al. 2018, section 3.2). Not every
    torch has that scale for `mps`: where a Mac has no bfloat16, `use_amp` raises `InputError`.
    """

    def __init__(self, device: torch.device, use_amp: bool):
        has_bfloat16 = True
        if device.type == "cuda":
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "mps":
            has_bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
            if use_amp and not has_bfloat16:
                raise InputError("--use_amp: bfloat16 on a Mac's GPU needs macOS 14 or newer; "
                                 "leave --use_amp out")  # fmt: skip
        self.dtype = torch.bfloat16 if has_bfloat16 else torch.float16
        self.device = device
        self.use_amp = use_amp
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=use_amp and self.dtype is torch.float16
        )

    def __str__(self) -> str:
        if self.use_amp:
            return f"mixed, {self.dtype}".replace("torch.", "")
        return "float32, TF32 products" if self.device.type == "cuda" else "float32"

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.use_amp)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to the parameters'; in float16, times the loss scale."""
        self.scaler.scale(loss).backward()

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """One step of the optimizer. The gradients are freed from the loss scale and clipped to a
        norm of `max_norm` before it, and deleted after it."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()  # now: the next activations need the memory


def amp_hint(precision: Precision, config: Config) -> str | None:
    """A line that recommends `--use_amp`, for training in float32 on a CPU that computes faster in
    bfloat16, as measured with a layer as the model's text tower has them; else None."""
    if precision.use_amp or precision.device.type != "cpu":
        return None
    seconds = layer_seconds(config.transformer_width, config.transformer_mlp_width)
    in_float32, in_bfloat16 = map(median, seconds)
    gain = in_float32 / in_bfloat16
    if gain < WORTH_A_HINT:
        return None
    return (f"hint: this CPU multiplies this model's matrices {gain:.1f} times as fast in bfloat16 "
            "as in float32, as measured just now: --use_amp trains faster")  # fmt: skip


@torch.no_grad()
def layer_seconds(width: int, mlp_width: int) -> tuple[list[float], list[float]]:
    """How long a linear layer from `width` to `mlp_width` channels takes the CPU in float32, and in
    bfloat16 with the casts that training makes, round by round, the two in turn. Draws no random
    numbers. A CPU without instructions for bfloat16 may need ten times as long in it."""
    x, weight = torch.full((ROWS, width), 0.5), torch.full((mlp_width, width), 0.5)
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + LONGEST
    for _ in range(ROUNDS):
        for use_amp, taken in enumerate(seconds):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(use_amp)):
                F.linear(x, weight)
            taken.append(time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return seconds
