"""One step of training: what it changes, what it keeps, and what it holds in memory."""

import copy
import gc

import pytest
import torch
from definitions import equal_scores
from tiny import tiny_clip

from models.clip_utils import create_model
from utils.machine.precision import Precision
from utils.training.distillation import Distillation
from utils.training.progress import epochs_left
from utils.training.state import State

CPU = torch.device("cpu")
NO_SCORES = equal_scores(0.0)


def state_of(**options) -> State:
    """A step of its optimizer subtracts the gradients."""
    torch.manual_seed(0)
    model = tiny_clip()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return State(model, optimizer, Precision(CPU, use_amp=False), **options)


def vector(module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().double()


def step(state, norm: float) -> torch.Tensor:
    """Take a step with random gradients whose overall norm is this; return what it changes."""
    before = vector(state.model)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter) * (norm / len(before) ** 0.5)
    state.update(torch.tensor(0.0))
    return vector(state.model) - before


@pytest.mark.parametrize("norm, expected", [(0.5, 0.5), (1.5, 1.0), (50.0, 1.0)])
def test_gradients_are_clipped_to_a_norm_of_one(norm, expected):
    assert step(state_of(), norm).norm().item() == pytest.approx(expected, rel=1e-2)


def test_no_step_raises_the_scale_above_a_hundred():
    """Radford et al. 2021, section 2.5."""
    state = state_of()
    torch.nn.init.constant_(state.model.logit_scale, 4.6)  # log(100) is 4.605
    state.model.logit_scale.grad = torch.tensor(-0.5)
    state.update(torch.tensor(0.0))
    assert state.model.logit_scale.exp().item() == pytest.approx(100)


def test_what_is_scored_is_the_average_of_the_weights_after_each_step():
    """Decayed by 0.75 a step, from the first step's weights on; the model itself trains on."""
    state, expected = state_of(ema=0.75), None
    for _ in range(4):
        step(state, 0.9)
        now = vector(state.model)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(vector(state.scored), expected, rtol=0, atol=1e-6)
    assert (now - expected).norm() > 0.1
    saved = state.state_dict()
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(saved["model"][name], tensor), name
    average = {f"module.{name}": t for name, t in state.scored.state_dict().items()}
    assert all(torch.equal(saved["average"][name], tensor) for name, tensor in average.items())
    state.finish_epoch({"train_loss": 0.0}, NO_SCORES, 0.0, {})
    assert state.epochs[-1]["logit_scale"] == pytest.approx(state.scored.logit_scale.exp().item())


def test_of_equal_epochs_the_first_is_the_best():
    """As for the file of the best weights, see test_folder.py: patience counts from it."""
    assert next(epochs_left(state_of(), 9, patience=1)) == 1
    for recalls, best in [([6.0, 5.0], 1), ([5.0, 5.0, 4.0], 1), ([4.0, 5.0, 5.0, 5.0], 2)]:
        state, done = state_of(), len(recalls)
        state.epochs = [{"epoch": n, "mean_recall": r} for n, r in enumerate(recalls, 1)]
        assert state.best_epoch == best
        assert not [*epochs_left(state, 9, patience=done - best)]
        assert next(epochs_left(state, 9, patience=done - best + 1)) == done + 1


def test_a_run_goes_on_with_its_moments_and_scores_and_with_the_settings_of_now():
    """Among them the loss scale of float16; the losses are those of the epoch under way."""

    def adamw(scale, **settings):
        state = state_of(ema=0.5)
        state.optimizer = torch.optim.AdamW(state.model.parameters(), **settings)
        state.precision.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        state.precision.scaler.scale(torch.tensor(0.0))  # as the first backward pass does
        return state

    old, new = adamw(16.0, lr=1e-3, weight_decay=0.5), adamw(8.0, lr=1e-4, weight_decay=0.1)
    old.note_start(NO_SCORES, 3.0, {"retention_pets": 80.0})
    assert old.start["retention_pets"] == 80 and old.is_at_start
    step(old, 0.5)
    assert not old.is_at_start
    old.finish_epoch({"train_loss": 1.0}, NO_SCORES, 2.0, {"retention_pets": 70.0})
    assert old.epochs[-1]["retention_pets"] == 70 and old.losses == [] and not old.is_at_start
    for _ in range(2):
        step(old, 0.5)
    new.model.load_state_dict(old.model.state_dict())
    new.restore(copy.deepcopy(old.state_dict()))
    assert (new.start, new.epochs, len(new.losses)) == (old.start, old.epochs, 2)
    assert new.precision.scaler.get_scale() == 16
    group = new.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.1)
    group |= {"lr": 1e-3, "weight_decay": 0.5}
    for state in (old, new):
        torch.manual_seed(1)
        step(state, 0.5)
    assert torch.equal(vector(new.model), vector(old.model))
    assert torch.equal(vector(new.scored), vector(old.scored))


@pytest.fixture
def only_new_objects():
    """The garbage collector neither searches nor lists what there was before the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def bytes_alive() -> int:
    """Of all tensors that there are, storages that are shared counted once."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_run_that_is_over_frees_weights_gradients_and_moments(only_new_objects):
    """Also where others still refer to the model and to its parameters, as train.py does."""
    assert not bytes_alive()
    model, start = create_model("ViT-demo"), create_model("ViT-demo").requires_grad_(False)
    parameters = list(model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters)
    distillation = Distillation(start, 1.0, ["image", "text"], torch.arange(9))
    state = State(model, optimizer, Precision(CPU, use_amp=False), 0.9, distillation)
    sum(parameter.sum() for parameter in parameters).backward()
    state.update(torch.tensor(0.0))
    # Weights, start, average, two moments; gradients are freed by each step.
    assert bytes_alive() > 5 * weights
    parameters[0].grad = torch.ones_like(parameters[0])
    state.release()
    assert bytes_alive() < weights / 100
