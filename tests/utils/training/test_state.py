"""What a run holds in memory."""

import gc

import torch

from models.clip_utils import create_model
from utils.machine.precision import Precision
from utils.training.keep import Keep
from utils.training.state import State


def bytes_alive() -> int:
    """Of all tensors that there are, storages that are shared counted once."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # and none of another test's fake ones
    tensors = [each for each in gc.get_objects() if type(each) in kinds]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_run_that_is_over_frees_weights_gradients_and_moments():
    """Also where others still refer to the model and to its parameters, as train.py does."""
    before = bytes_alive()
    model, start = create_model("ViT-demo"), create_model("ViT-demo").requires_grad_(False)
    parameters = list(model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters)
    keep = Keep(start, 1.0, ["image", "text"])
    state = State(model, optimizer, Precision(torch.device("cpu"), False), 0.9, keep)
    sum(parameter.sum() for parameter in parameters).backward()
    state.update(torch.tensor(0.0))
    # Weights, start, average, two moments; gradients are freed by each step.
    assert bytes_alive() - before > 5 * weights
    parameters[0].grad = torch.ones_like(parameters[0])
    state.release()
    assert bytes_alive() - before < weights / 100
