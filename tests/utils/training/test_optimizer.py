"""Steps of the optimizer against torch's own with the published settings; the learning rate."""

import math

import pytest
import torch
from tiny import NAMED, tiny_clip

from models.clip_utils import create_model
from utils.training.distillation import word_embedding
from utils.training.optimizer import (
    EMBEDDING_FACTOR,
    Schedule,
    parameter_groups,
    set_learning_rate,
)

PEERS = {
    # Radford et al. 2021, table 18: beta2 0.98, epsilon 1e-6.
    "AdamW": dict(betas=(0.8, 0.98), eps=1e-6),
    "Adam": dict(betas=(0.8, 0.98), eps=1e-6),
    "SGD": dict(momentum=0.8, nesterov=True),
}


@pytest.mark.parametrize("kind", PEERS)
def test_steps_are_those_of_torch_with_clips_settings(kind):
    """Matrices decay, biases, gains and the logit scale do not. Gradients are as small as epsilon,
    and each step has others, so that every setting shows."""
    torch.manual_seed(0)
    model, peer = tiny_clip(), tiny_clip()
    peer.load_state_dict(model.state_dict())
    groups = parameter_groups(model, momentum=0.8, weight_decay=0.3)
    optimizer = getattr(torch.optim, kind)(groups, lr=1.0)
    set_learning_rate(optimizer, 0.01)
    groups = [
        {"params": [p for p in peer.parameters() if (p.ndim >= 2) == is_matrix], "weight_decay": w}
        for is_matrix, w in ((True, 0.3), (False, 0.0))
    ]
    expected = getattr(torch.optim, kind)(groups, lr=0.01, **PEERS[kind])
    for size in (1e-6, 3e-7, 2e-6):
        for own, other in zip(model.parameters(), peer.parameters(), strict=True):
            own.grad = size * torch.randn_like(own)
            other.grad = own.grad.clone()
        optimizer.step()
        expected.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, peer.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_weight_decay_is_for_matrices_only():
    model = create_model("ViT-demo")
    embeddings, decayed, others = parameter_groups(model, 0.9, 0.1)
    assert decayed["weight_decay"] == embeddings["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    of_texts = {id(model.token_embedding.weight), id(model.positional_embedding)}
    assert {id(p) for p in embeddings["params"]} == of_texts
    assert len(decayed["params"]) + len(others["params"]) + 2 == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {
        name
        for name in names.values()
        if name.endswith("bias") or ".ln_" in name or name.startswith("ln_")
        or name in ("logit_scale", "visual.class_embedding")
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ViT-tiny", "cn-tiny"])
def test_fine_tuned_words_move_less_and_unused_ones_not_at_all(name):
    torch.manual_seed(0)
    model = tiny_clip(NAMED[name])
    groups = parameter_groups(model, 0.9, 0.1, layer_decay=0.5, is_from_scratch=False)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.01)
    words = word_embedding(model).weight
    before, matrix = words.detach().clone(), model.visual.conv1.weight.detach().clone()
    words.grad = torch.zeros_like(words)
    words.grad[5] = 1.0
    model.visual.conv1.weight.grad = torch.ones_like(matrix)
    optimizer.step()
    rate = 0.01 * 0.5**3  # both are before two blocks; Adam's first step is the rate itself
    moved = before - words.detach()
    torch.testing.assert_close(moved[5], torch.full_like(moved[5], EMBEDDING_FACTOR * rate))
    assert moved.count_nonzero() == moved[5].numel()
    expected = matrix * 0.1 * rate + rate
    torch.testing.assert_close(matrix - model.visual.conv1.weight.detach(), expected)
    (group,) = (g for g in groups if any(p is words for p in g["params"]))
    assert group["weight_decay"] == 0 and all(p.shape[1] == words.shape[1] for p in group["params"])


def test_the_learning_rate_rises_then_falls_along_a_cosine():
    rates = [Schedule(2.0, 10, 110).rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * i / 100) for i in range(100)])


@pytest.mark.parametrize("steps, warmup", [(1860, 93), (930, 50), (200, 40), (10, 2), (4, 0)])
def test_warmup_is_a_twentieth_but_at_least_50_steps_and_at_most_a_fifth(steps, warmup):
    rates = [Schedule(1.0, None, steps).rate(step) for step in range(steps)]
    assert rates == [Schedule(1.0, warmup, steps).rate(step) for step in range(steps)]
