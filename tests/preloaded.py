"""What takes scripts seconds before they do work of their own: done once, in the process of which
they are forks."""

import io
import os
from contextlib import suppress
from importlib import import_module
from types import CodeType

del os.environ["PYTHONPATH"]  # by which this module was found; users have none

from jinja2 import Environment, UndefinedError
from matplotlib.figure import Figure
from tiny import NAMED

from models.tokens import clip_tokenizer
from models.weights.registry import CONFIGS
from utils.retrieval import report

for name in (
    "models.clip_utils",
    "utils.flickr8k_dataloader",
    "utils.machine.pyzjr_parts",
    "utils.metric",
    "utils.training.gradients",
):
    import_module(name)
assert clip_tokenizer().fragments
CONFIGS |= NAMED
os.fsync = lambda file: None  # no test cuts the power, and a disk takes long for it
figure = Figure()
figure.subplots().set(title="finds the fonts")
figure.savefig(io.BytesIO())


compile_anew, compiled = Environment.compile, {}


def compile_once(environment: Environment, source: str, *how: object) -> CodeType:
    """The code of a template."""
    if source not in compiled:
        compiled[source] = compile_anew(environment, source, *how)
    return compiled[source]


Environment.compile = compile_once
with suppress(UndefinedError):  # it lacks all that the page shows
    report._render({})
