"""The model that fine-tuning starts from, kept to hold the features near its own."""

from typing import NamedTuple

from models.clip import CLIP
from models.clip_utils import load
from models.errors import InputError
from utils.runs.folder import Run
from utils.training.layer_groups import trainable_towers


class Distillation(NamedTuple):
    """What pulls features towards those of the starting model: on images in random other colours
    and on captions with random other words, which are more unlike each other than what is learned
    from, and so hold more of what the model does elsewhere.

    LDIFS (Mukhoti et al. 2023) holds the features of all layers on the training data as they are;
    here it is the features that are compared, on inputs that are altered at random, as in knowledge
    distillation by function matching (Beyer et al. 2022).

    start   the starting model
    weight  of the mean squared distance to its features in the loss
    towers  those in which something learns; the features of the others stay by themselves
    """

    start: CLIP
    weight: float
    towers: list[str]


def distill_from_start(model: CLIP, run: Run, weight: float) -> Distillation:
    """The model that the run has started from beside `model`, which learns. They share the
    parameters that do not. Raises `InputError` if the run's start_weights.pth is missing."""
    file = run.processes.broadcast(run.folder) / "weights" / "start_weights.pth"
    if not file.exists():
        raise InputError(f"{file} is missing, whose features --distill keeps: put it back")
    start, _ = load(file, model.device)
    start.requires_grad_(False)
    for name, parameter in start.named_parameters():
        own = model.get_parameter(name)
        if not own.requires_grad:
            parameter.data = own.data
    return Distillation(start, weight, trainable_towers(model))
