"""Distillation: a loss that holds the features near those of the starting model."""

from pathlib import Path
from typing import NamedTuple

from models.clip import CLIP
from models.clip_utils import load
from models.errors import InputError
from utils.training.layer_groups import train_mode, trainable_towers


class Distillation(NamedTuple):
    """The teacher is the starting model. Its features are compared with the model's on images in
    random colours and captions of random words. These differ more from each other than the training
    data, and so hold more of what the model does elsewhere.

    LDIFS (Mukhoti et al. 2023) compares the features of all layers on the training data. Comparing
    outputs on inputs altered at random is distillation by function matching (Beyer et al. 2022).

    start   the starting model
    weight  of the mean squared distance between features, in the loss
    towers  those with trainable parameters; the features of the others cannot change
    """

    start: CLIP
    weight: float
    towers: list[str]


def distill_from_start(model: CLIP, start_weights: Path, weight: float) -> Distillation:
    """Distillation from `start_weights`, the file of the starting model, which shares the frozen
    parameters with `model`. Raises `InputError` if the file is missing."""
    if not start_weights.exists():
        raise InputError(f"{start_weights} is missing, whose features --distill keeps: put it back")
    start, _ = load(start_weights, model.device)
    start.requires_grad_(False)
    for name, parameter in start.named_parameters():
        own = model.get_parameter(name)
        if not own.requires_grad:
            parameter.data = own.data
    train_mode(start)  # computes like the model; its batch norms, all frozen, keep their statistics
    return Distillation(start, weight, trainable_towers(model))
