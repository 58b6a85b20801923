"""The contrastive loss and its gradients against float64, written as in the paper."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from utils import contrastive_loss
from utils import loss as module


def as_in_the_paper(image_features, text_features, logit_scale):
    """Figure 3 of Radford et al. 2021, in the precision of its input."""
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    logits = image_features @ text_features.T * logit_scale.exp()
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_gradients(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 16), st.integers(0, 2**31), st.integers(1, 50))
def test_value_and_gradients_equal_float64(n, d, seed, block):
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.1 for _ in "ab"]
    scale = torch.tensor(4.6, dtype=torch.float64)
    expected = with_gradients(as_in_the_paper, *features, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = with_gradients(contrastive_loss, *(x.float() for x in (*features, scale)))
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * (b.norm() + 1)


def test_it_is_open_clips_loss():
    image_features, text_features = torch.randn(2, 3000, 32).unbind(0)
    scale = torch.tensor(3.0)
    normalized = [F.normalize(x, dim=-1) for x in (image_features, text_features)]
    expected = ClipLoss()(*normalized, scale.exp())
    found = contrastive_loss(image_features, text_features, scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_features_are_compared_in_float32():
    image_features, text_features = torch.randn(2, 64, 512).unbind(0)
    halves = [x.bfloat16() for x in (image_features, text_features)]
    scale = torch.tensor(4.6)
    expected = as_in_the_paper(*(x.double() for x in halves), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(*halves, scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32
