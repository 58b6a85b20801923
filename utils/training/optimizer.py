"""Parameter groups with their decay and learning rates, and the schedule of the learning rate."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from models.clip import CLIP
from utils.training.layer_groups import distance_from_end

EMBEDDING_FACTOR = 0.3
TEXT_POSITIONS = re.compile(r"(text\.)?positional_embedding")
RESTART_FACTOR = 3  # by which the rate falls


def parameter_groups(
    model: CLIP,
    momentum: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    is_from_scratch: bool = True,
) -> list[dict]:
    """Parameter groups for an optimizer, with CLIP's beta2 and epsilon (Radford et al. 2021, table
    18). Only matrices have weight decay. A layer's learning rate is `layer_decay` times that of the
    next one (Clark et al. 2020, "ELECTRA", section 3.1): the group's `rate_factor`.

    In fine-tuning, embeddings of tokens and their positions have no weight decay, so that unused
    ones stay, and `EMBEDDING_FACTOR` times the rate. Their entries are small, and Adam moves all
    entries alike: at the full rate, 40 steps moved the matrices of ViT-demo's text tower by 0.6% of
    their norm, the rows of the captions' words by 1.1%, the positions by 2.4%; at this rate by 0.3%
    and 0.7%.
    """
    settings = {
        "betas": (momentum, 0.98),
        "eps": 1e-6,
        "momentum": momentum,
        "nesterov": momentum > 0,
        "fused": True,
    }
    distances = distance_from_end(model)
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings |= {p for n, p in model.named_parameters() if TEXT_POSITIONS.fullmatch(n)}
    groups: dict[tuple[float, bool, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, is_matrix = layer_decay ** distances[name], parameter.ndim >= 2
        kind = factor, is_matrix, parameter in embeddings
        decay = weight_decay if is_matrix else 0.0
        if parameter in embeddings and not is_from_scratch:
            factor, decay = EMBEDDING_FACTOR * factor, 0.0
        of_group = {"weight_decay": decay, "rate_factor": factor}
        group = groups.setdefault(kind, {"params": [], **of_group, **settings})
        group["params"].append(parameter)
    return list(groups.values())


class Schedule(NamedTuple):
    """Linear warmup from zero to `peak`, then half a cosine to zero (Loshchilov & Hutter 2017). A
    run that goes back to its starting weights begins a new one, with a third of the rate. Without
    `warmup_steps` they are a twentieth of the steps, but at least 50, and at most a fifth."""

    peak: float
    warmup_steps: int | None
    total_steps: int

    def rate(self, step: int, restarts: Sequence[int] = ()) -> float:
        """The learning rate of a step, counted from 0 as are the steps of the `restarts`."""
        peak, start = self.peak / RESTART_FACTOR ** len(restarts), max(restarts, default=0)
        step, total_steps, warmup_steps = step - start, self.total_steps - start, self.warmup_steps
        if warmup_steps is None:
            warmup_steps = min(max(50, total_steps // 20), total_steps // 5)
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to `rate` times the group's `rate_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
