"""Parts of the transformer in mixed precision, against float32 and against other libraries."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss
from peers import small_open_clip

from models import build_model, tokenize
from models.attention import attend
from models.clip_utils import create_model
from models.packing import LENGTH_MULTIPLE, pack
from models.transformer import LayerNorm, QuickGELU, _LayerNorm
from models.weights.open_clip import from_open_clip
from utils import contrastive_loss

ROUNDING = 2**-8  # of a number in bfloat16, relative


def relative(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.sampled_from([8, 64, 80]),
    st.sampled_from(["all", "causal", "masked", "pooled"]), st.integers(0, 2**16),
)  # fmt: skip
def test_bfloat16_attention_is_that_of_float32_to_its_rounding(n, heads, length, c, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(3, n, heads, length, c, generator=generator).bfloat16()
    query, key, value = qkv
    mask = None
    if kind in ("masked", "pooled"):
        ends = torch.randint(length, (n, 1, 1, 1), generator=generator)
        mask = torch.arange(length) <= ends
    if kind == "pooled":
        query = query[:, :, :1]
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    rows = [x.transpose(1, 2).flatten(2) for x in inputs]  # [n, length, heads * c]
    found = attend(rows, heads, mask, kind == "causal").unflatten(-1, (heads, c)).transpose(1, 2)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=kind == "causal")
    assert found.dtype is torch.bfloat16
    assert relative(found, expected) < 2 * ROUNDING
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((found.float() * weights).sum(), inputs)
    exact = torch.autograd.grad((expected * weights).sum(), exact)
    scale = max(gradient.norm() for gradient in exact)
    for gradient, other in zip(gradients, exact, strict=True):
        assert (gradient.float() - other).norm() < 4 * ROUNDING * scale


def test_the_gradient_of_quick_gelu_is_that_of_its_definition():
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    defined = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(QuickGELU()(x), defined)
    (found,) = torch.autograd.grad(QuickGELU()(x).sum(), x)
    (expected,) = torch.autograd.grad(defined.sum(), x)
    torch.testing.assert_close(found, expected)


def test_layer_norm_keeps_the_type_and_computes_its_statistics_in_float32():
    """In bfloat16, the sum of 4096 ones is 256: more do not change it."""
    norm = LayerNorm(4096)
    x = (torch.randn(3, 4096, generator=torch.Generator().manual_seed(0)) + 1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype is torch.bfloat16 and norm(x.float()).dtype is torch.float32
    assert relative(found, norm(x.float())) < ROUNDING


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_gain_and_bias_of_layer_normalisation_are_float32(as_on_a_gpu):
    """A gain that bfloat16 cannot tell from 1 shows in features and in gradients: against torch's
    own in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator).bfloat16().requires_grad_()
    norm = LayerNorm(96)
    torch.nn.init.constant_(norm.weight, 1 + 1e-3)
    torch.nn.init.constant_(norm.bias, 1e-5)
    found = _LayerNorm.apply(x, norm.weight, norm.bias, norm.eps) if as_on_a_gpu else norm(x)
    exact = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    expected = F.layer_norm(exact[0], (96,), *exact[1:], norm.eps)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    gradients = torch.randn(64, 96, generator=generator).bfloat16()
    found = torch.autograd.grad(found, [x, norm.weight, norm.bias], gradients)
    expected = torch.autograd.grad(expected, exact, gradients.double())
    of_x, *others = (relative(*pair) for pair in zip(found, expected, strict=True))
    assert of_x < ROUNDING
    assert max(others) < (1e-5 if as_on_a_gpu else 4 * ROUNDING)  # the CPU adds in bfloat16


def losses_and_gradients(model, loss, mixed):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        value = loss(model)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_loss_and_gradients_in_bfloat16_are_as_near_to_float32_as_those_of_open_clip(quick_gelu):
    """Of three models together: the errors of a single one differ by chance."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 64, 64, generator=generator)
    tokens = tokenize([f"{'a red ' * (i % 7)}bird {i}" for i in range(16)])

    def our_loss(model):
        features = model.encode_image(images), model.encode_text(tokens)
        return contrastive_loss(*features, model.logit_scale)

    def their_loss(model):
        image_features, text_features, scale = model(images, tokens.long())[:3]
        return ClipLoss()(image_features.float(), text_features.float(), scale)

    def errors(model, loss):
        value, found = losses_and_gradients(model, loss, mixed=True)
        difference = sum((found[name] - g).square().sum() for name, g in exact.items()) ** 0.5
        return abs(value - exact_loss), difference.item()

    ours_in_all = theirs_in_all = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        theirs, description = small_open_clip(quick_gelu)
        weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
        ours = build_model(weights, from_open_clip(description))
        exact_loss, exact = losses_and_gradients(ours, our_loss, mixed=False)
        (loss_error, error), (_, their_error) = errors(ours, our_loss), errors(theirs, their_loss)
        assert loss_error < 4 * ROUNDING * exact_loss
        ours_in_all += error
        theirs_in_all += their_error
    assert 0 < ours_in_all <= 1.5 * theirs_in_all


def test_scores_in_mixed_precision_have_a_residual_stream_in_float32():
    """In evaluation mode features are nearer to those of float32 than in training mode, in which
    each block rounds the stream once more."""
    theirs, description = small_open_clip(layers=12)
    model = build_model(theirs.state_dict(), from_open_clip(description))
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = model.encode_image(images)
    errors = []
    for is_training in (True, False):
        model.train(is_training)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(relative(model.encode_image(images), exact))
    trained, scored = errors
    assert scored < 0.8 * trained


def test_attention_on_a_gpu_is_flash_or_memory_efficient():
    """cuDNN's plans anew for every length."""
    kernels = torch.backends.cuda
    assert kernels.flash_sdp_enabled() and kernels.mem_efficient_sdp_enabled()
    assert not kernels.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", ["ViT-demo", "cn-demo"])
def test_longer_grids_change_no_feature(monkeypatch, name):
    """Those of CUDA, whose length is a multiple of 8: the added cells are padding."""
    model = create_model(name)
    tokens = model.tokenize(["a dog", "a red bird on a green tree", "一只鸟"])
    expected = model.encode_text(tokens)
    monkeypatch.setitem(LENGTH_MULTIPLE, "cpu", LENGTH_MULTIPLE["cuda"])
    ends = torch.tensor([6, 7, 8])
    assert pack(torch.ones(3, 9), ends, True, expected.device)[2].length == 16
    torch.testing.assert_close(model.encode_text(tokens), expected, rtol=1e-4, atol=1e-5)
