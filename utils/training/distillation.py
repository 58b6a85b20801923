"""Distillation: a loss that holds the features near those of the starting model."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.clip import CLIP
from models.clip_utils import load
from models.tokens import TokenizedTexts
from utils.training.layer_groups import train_mode, trainable_towers

TUNED_SCALE = 18.7  # of the starting models with which the default weight was chosen


class Distillation(NamedTuple):
    """The teacher is the starting model. Its features are compared with the model's on images in
    random colours and captions of random words. These differ more from each other than the training
    data, and so hold more of what the model does elsewhere.

    LDIFS (Mukhoti et al. 2023) compares the features of all layers on the training data. Comparing
    outputs on inputs altered at random is distillation by function matching (Beyer et al. 2022).

    start   the starting model
    weight  of the mean squared distance between features, in the loss
    towers  those with trainable parameters; the features of the others cannot change
    unused  the ids of words that no training caption has, on the device. Their embeddings stay as
            they are: Adam would make a full step of their small gradients.
    """

    start: CLIP
    weight: float
    towers: list[str]
    unused: Tensor

    def keep_unused_words(self, model: CLIP) -> None:
        """Set the gradients of the embeddings of unused words to zero."""
        gradient = word_embedding(model).weight.grad
        if gradient is not None:
            gradient.index_fill_(0, self.unused, 0.0)


def distill_from_start(
    model: CLIP, start_weights: Path, weight: float, captions: TokenizedTexts | None
) -> Distillation:
    """Distillation from `start_weights`, the file of the starting model, which shares the frozen
    parameters with `model`, in training on `captions` (None: any words). `weight` counts at a logit
    scale of `TUNED_SCALE`: the scale multiplies cosines, 1 minus half the squared distance."""
    start, _ = load(start_weights, model.device)
    start.requires_grad_(False)
    for name, parameter in start.named_parameters():
        own = model.get_parameter(name)
        if not own.requires_grad:
            parameter.data = own.data
    train_mode(start)  # computes like the model; its batch norms, all frozen, keep their statistics
    words = word_embedding(model).num_embeddings
    counts = captions.counts(words) if captions else np.ones(words)
    unused = torch.from_numpy(np.flatnonzero(counts == 0)).to(model.device)
    weight *= start.logit_scale.exp().item() / TUNED_SCALE
    return Distillation(start, weight, trainable_towers(model), unused)


def word_embedding(model: nn.Module) -> nn.Embedding:
    """The largest embedding of a model."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(embeddings, key=lambda module: module.num_embeddings)
