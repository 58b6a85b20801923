"""The contrastive loss and its gradients against float64, written as in the paper."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from models.errors import InputError
from utils import contrastive_loss
from utils import loss as module


def by_definition(image_features, text_features, logit_scale):
    """Figure 3 of Radford et al. 2021, in the precision of its input; with several captions an
    image, the mean over them, the image's other captions left out."""
    n, k = len(image_features), len(text_features) // len(image_features)
    image_features = image_features / image_features.norm(dim=1, keepdim=True)
    text_features = text_features / text_features.norm(dim=1, keepdim=True)
    logits = image_features @ text_features.T * logit_scale.exp()
    labels = torch.arange(n)
    total = 0
    for i in range(n):
        others = [t for t in range(n * k) if t // k != i]
        for caption in range(i * k, (i + 1) * k):
            over_texts = logits[i, [caption, *others]][None]
            over_images = logits[:, caption][None]
            total += F.cross_entropy(over_texts, torch.tensor([0]))
            total += F.cross_entropy(over_images, labels[[i]])
    return total / (2 * n * k)


def with_gradients(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 16),
    k=st.integers(1, 4),
    d=st.integers(2, 16),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 20),
)
def test_value_and_gradients_equal_float64(n, k, d, seed, block):
    generator = torch.Generator().manual_seed(seed)
    features = [
        torch.randn(rows, d, generator=generator, dtype=torch.float64) + 0.1 for rows in (n, n * k)
    ]
    scale = torch.tensor(4.6, dtype=torch.float64)
    expected = with_gradients(by_definition, *features, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = with_gradients(contrastive_loss, *(x.float() for x in (*features, scale)))
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * (b.norm() + 1)


def test_with_one_caption_an_image_it_is_open_clips_loss():
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
    expected = by_definition(*(x.double() for x in halves), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(*halves, scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("texts", [0, 3, 5])
def test_every_image_needs_equally_many_texts(texts):
    with pytest.raises(InputError, match=f"{texts} texts for 4 images"):
        contrastive_loss(torch.randn(4, 8), torch.randn(texts, 8), torch.tensor(1.0))
