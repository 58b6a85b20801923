"""What takes scripts seconds before they do work of their own: done once, in the process of which
they are forks."""

import io
import os
from importlib import import_module

del os.environ["PYTHONPATH"]  # by which this module was found; users have none

from matplotlib.figure import Figure
from tiny import NAMED

from models.tokens import clip_tokenizer
from models.weights.registry import CONFIGS

for name in (
    "models.clip_utils",
    "utils.flickr8k_dataloader",
    "utils.machine.pyzjr_parts",
    "utils.metric",
    "utils.retrieval.report",
    "utils.training.gradients",
):
    import_module(name)
clip_tokenizer()
CONFIGS |= NAMED
os.fsync = lambda file: None  # no test cuts the power, and a disk takes long for it
figure = Figure()
figure.subplots().set(title="finds the fonts")
figure.savefig(io.BytesIO())
