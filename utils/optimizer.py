"""What is decayed, and how the learning rate moves."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, momentum: float, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and all else (biases, gains, the logit scale), which does
    not. The groups carry CLIP's settings for Adam: beta2 0.98 and epsilon 1e-6 (Radford et al.
    2021, table 18)."""
    settings = {
        "betas": (momentum, 0.98),
        "eps": 1e-6,
        "momentum": momentum,
        "nesterov": momentum > 0,
        "fused": True,
    }
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay, **settings},
        {"params": others, "weight_decay": 0.0, **settings},
    ]


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load saved moments; settings stay those that the optimizer was made with."""
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warmup from zero to `peak`, then half a cosine to zero (Loshchilov & Hutter 2017)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
