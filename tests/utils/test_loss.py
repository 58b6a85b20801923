"""The contrastive loss and its gradients against float64, written as in the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from definitions import loss_by_definition, sigmoid_loss_by_definition
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss

from models.errors import InputError
from utils import contrastive_loss
from utils import loss as module


def with_gradients(loss, *inputs, **others):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs, **others)
    return value, *torch.autograd.grad(value, inputs)


def random_features(n, k, d, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, d, generator=generator, dtype=torch.float64) + 0.1 for rows in (n, n * k)
    ]


def assert_equals_float64(loss, definition, *inputs, block, **others):
    """The value and the gradients of `loss` in float32, in blocks of so many rows."""
    expected = with_gradients(definition, *inputs, **others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = with_gradients(loss, *(x.float() for x in inputs), **others)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * (b.norm() + 1)


@settings(max_examples=60)
@given(
    n=st.integers(1, 16),
    k=st.integers(1, 4),
    d=st.integers(2, 16),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 20),
)
def test_value_and_gradients_equal_float64(n, k, d, seed, block):
    features = random_features(n, k, d, seed)
    scale = torch.tensor(4.6, dtype=torch.float64)
    assert_equals_float64(contrastive_loss, loss_by_definition, *features, scale, block=block)


@settings(max_examples=100)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 3),
    further=st.integers(0, 3),
    different=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 14),
)
def test_positives_of_an_image_are_never_its_negatives(n, k, further, different, seed, block):
    """From one text for all, without any negatives, to texts that hardly ever repeat."""
    features, scale = random_features(n, k, 8, seed), torch.tensor(4.6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    texts = 7 * torch.randint(0, different, (n, k + further), generator=generator)
    assert_equals_float64(
        contrastive_loss, loss_by_definition, *features, scale, block=block, texts=texts
    )


@pytest.mark.parametrize("k", [1, 2])
def test_where_no_text_is_shared_the_loss_is_the_same_bit_for_bit(k):
    """An image may have equal captions, and positives that no other image brings."""
    inputs = [x.float() for x in (*random_features(9, k, 8, 0), torch.tensor(4.6))]
    own = torch.arange(9)[:, None].expand(9, k)
    texts = torch.cat([own, own + 100, torch.full((9, 1), 1000)], dim=1)
    found, expected = (
        with_gradients(contrastive_loss, *inputs, **o) for o in ({"texts": texts}, {})
    )
    assert all(map(torch.equal, found, expected))


def test_two_classes_as_captions_can_be_learned_to_a_loss_of_zero():
    """Features that tell the classes apart are perfect; a loss that takes equal captions for
    negatives stays at log 3, since three images share each caption."""
    of_class = torch.eye(2)[torch.tensor([0, 1, 0, 1, 0, 1])]
    texts = torch.tensor([[0], [1], [0], [1], [0], [1]])
    scale = torch.tensor(100.0).log()
    assert contrastive_loss(of_class, of_class, scale, texts=texts).item() < 1e-6
    assert contrastive_loss(of_class, of_class, scale).item() == pytest.approx(math.log(3), 1e-5)


def test_with_one_caption_an_image_it_is_open_clips_loss():
    image_features, text_features = torch.randn(2, 3000, 32).unbind(0)
    scale = torch.tensor(3.0)
    normalized = [F.normalize(x, dim=-1) for x in (image_features, text_features)]
    expected = ClipLoss()(*normalized, scale.exp())
    found = contrastive_loss(image_features, text_features, scale)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(
    n=st.integers(1, 10),
    k=st.integers(1, 3),
    further=st.integers(0, 2),
    different=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 12),
)
def test_the_sigmoid_loss_and_its_gradients_equal_float64(n, k, further, different, seed, block):
    """From one text for all, all pairs being positives, to texts that hardly ever repeat."""
    numbers = torch.tensor([2.3, -10.0], dtype=torch.float64)  # the start of training, section 3.1
    inputs = [*random_features(n, k, 8, seed), *numbers]
    generator = torch.Generator().manual_seed(seed)
    texts = 7 * torch.randint(0, different, (n, k + further), generator=generator)
    assert_equals_float64(
        sigmoid_loss, sigmoid_loss_by_definition, *inputs, block=block, texts=texts
    )


def sigmoid_loss(image_features, text_features, scale, bias, **others):
    return contrastive_loss(image_features, text_features, scale, logit_bias=bias, **others)


def test_with_one_caption_an_image_the_sigmoid_loss_is_open_clips():
    image_features, text_features = torch.randn(2, 3000, 32).unbind(0)
    scale, bias = torch.tensor(3.0), torch.tensor(-10.0)
    normalized = [F.normalize(x, dim=-1) for x in (image_features, text_features)]
    expected = SigLipLoss()(*normalized, scale.exp(), bias)
    found = sigmoid_loss(image_features, text_features, scale, bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_features_are_compared_in_float32():
    image_features, text_features = torch.randn(2, 64, 512).unbind(0)
    halves = [x.bfloat16() for x in (image_features, text_features)]
    scale = torch.tensor(4.6)
    expected = loss_by_definition(*(x.double() for x in halves), scale.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(*halves, scale)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("texts", [0, 3, 5])
def test_every_image_needs_equally_many_texts(texts):
    with pytest.raises(InputError, match=f"{texts} texts for 4 images"):
        contrastive_loss(torch.randn(4, 8), torch.randn(texts, 8), torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(3, 2), (4, 1)])
def test_texts_should_tell_of_every_caption(shape):
    with pytest.raises(InputError, match=r"texts \[\d, \d\] should be \[4, m\], m being 2"):
        contrastive_loss(
            torch.randn(4, 8), torch.randn(8, 8), torch.tensor(1.0), texts=torch.zeros(shape)
        )
