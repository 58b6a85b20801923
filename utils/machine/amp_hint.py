"""Whether training on this CPU would be faster in bfloat16: measured, not guessed."""

import time
from statistics import median

import torch
import torch.nn.functional as F

from models.weights.config import Config
from utils.machine.precision import Precision

WORTH_A_HINT = 1.2  # times as fast in bfloat16 as in float32
ROWS = 128  # tokens that a layer is timed with; a step has more, and gains rather more
ROUNDS = 9
LONGEST = 0.1  # seconds, after which no other round starts


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
