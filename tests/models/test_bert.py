"""Our Chinese-CLIP compared with those of transformers and cn_clip, given the same weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import chinese_clip_model, cn_clip_model, disturb

from models import CLIP, build_model
from models.errors import InputError
from models.lora import add_lora, merged
from models.weights.registry import CONFIGS
from models.weights.transformers import to_ours, to_transformers
from utils import contrastive_loss

CAPTIONS = [
    "一只棕色的狗叼着红色的球在潮湿的沙滩上奔跑，旁边有两个孩子",
    "狗",
    "两个登山者 climbing a rock in 2024",
    "一个穿红色衣服的女孩在草地上奔跑。",
]
SMALL = replace(CONFIGS["cn-demo"], vision_layers=2, transformer_layers=2, text_positions=64)
CASES = {
    "small": SMALL,
    "one block, 80 channels a head": replace(
        SMALL, vision_width=160, vision_mlp_width=640, vision_head_width=80, transformer_layers=1
    ),
    "RBT3": replace(
        SMALL, transformer_width=768, transformer_mlp_width=3072, transformer_heads=12,
        transformer_layers=3, text_positions=512,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def trio(request):
    """(our model, transformers' model, images, tokens) of a case."""
    config = CASES[request.param]
    theirs = chinese_clip_model(config)
    weights = to_ours({k: t.clone() for k, t in theirs.state_dict().items()})
    ours = build_model(weights, config)
    images = torch.randn(len(CAPTIONS), 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return ours, theirs, images, ours.tokenize(CAPTIONS)


def losses_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_equal(ours, theirs):
    """Within 1e-4 of each gradient's norm, and 1e-7 of the largest: that of the keys' bias is zero
    but for rounding, since it changes all scores of a query equally, which softmax ignores."""
    assert ours.keys() == theirs.keys()
    largest = max(g.norm() for g in theirs.values())
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-7 * largest, (name, error, gradient.norm())


def our_loss(model, images, tokens):
    features = model.encode_image(images), model.encode_text(tokens)
    return contrastive_loss(*features, model.logit_scale)


def test_features_loss_and_gradients_equal_transformers(trio):
    ours, theirs, images, tokens = trio
    output = theirs(
        input_ids=tokens.long(), attention_mask=tokens.ne(0), pixel_values=images, return_loss=True
    )
    loss = our_loss(ours, images, tokens)
    for a, b in [
        (F.normalize(ours.encode_image(images), dim=-1), output.image_embeds),
        (F.normalize(ours.encode_text(tokens), dim=-1), output.text_embeds),
        (ours(images, tokens)[0], output.logits_per_image),
        (loss, output.loss),
    ]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    mine = to_transformers(losses_and_gradients(ours, loss))
    assert_gradients_equal(mine, losses_and_gradients(theirs, output.loss))


def test_features_loss_and_gradients_equal_cn_clip(trio):
    ours, _, images, tokens = trio
    theirs = cn_clip_model(ours.config, ours.state_dict())
    image_features, text_features, scale = theirs(images, tokens.long())
    with torch.no_grad():
        pairs = [(ours.encode_image(images), theirs.encode_image(images))]
        pairs += [(ours.encode_text(tokens), theirs.encode_text(tokens.long()))]
    logits = scale * image_features @ text_features.T
    targets = torch.arange(len(images))
    their_loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    loss = our_loss(ours, images, tokens)
    for a, b in [*pairs, (loss, their_loss)]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    mine = losses_and_gradients(ours, loss)
    assert_gradients_equal(mine, losses_and_gradients(theirs, their_loss))


def test_checkpointed_gradients_are_the_same(trio):
    ours, _, images, tokens = trio
    plain = losses_and_gradients(ours, our_loss(ours, images, tokens))
    again = build_model(ours.state_dict(), ours.config)
    again.enable_grad_checkpointing()
    for name, gradient in losses_and_gradients(again, our_loss(again, images, tokens)).items():
        torch.testing.assert_close(gradient, plain[name], atol=0, rtol=0)


def test_low_rank_changes_of_all_its_matrices_can_be_merged():
    torch.manual_seed(0)
    model = CLIP(SMALL).initialize().eval()
    tokens, before = model.tokenize(CAPTIONS), model.state_dict()
    add_lora(model, rank=3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            torch.nn.init.normal_(parameter, std=0.05)
    plain = merged(model.state_dict())
    moved = {name for name in before if not torch.equal(plain[name], before[name])}
    # Query, key, value, output and two of the MLP in each block.
    assert sum(name.startswith("bert.encoder.layer.") for name in moved) == 2 * 6
    with torch.no_grad():
        mine, theirs = (m.encode_text(tokens) for m in (model, build_model(plain, SMALL)))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@settings(max_examples=20)
@given(st.lists(st.text("一只狗在跑, dog", max_size=70), min_size=1, max_size=5))
def test_a_text_has_the_same_feature_in_every_batch(texts):
    torch.manual_seed(0)
    model = CLIP(SMALL).initialize().eval()
    disturb(model)
    tokens = model.tokenize(texts, truncate=True)
    with torch.no_grad():
        together = model.encode_text(tokens)
        alone = torch.cat([model.encode_text(row[None]) for row in tokens])
        cut = model.encode_text(tokens[:, : int(tokens.ne(0).sum(1).max())])
        padded = model.encode_text_grid(tokens)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, padded, atol=1e-5, rtol=1e-5)
    assert torch.equal(together, cut)


def test_each_token_and_each_place_counts():
    torch.manual_seed(0)
    model = CLIP(SMALL).initialize().eval()
    with torch.no_grad():
        features = model.encode_text(model.tokenize(["狗咬人", "人咬狗", "狗咬", "狗咬人了"]))
    differences = torch.cdist(features, features) + torch.eye(4)
    assert (differences > 1e-3).all()


def test_rows_that_are_too_long_are_refused():
    model = CLIP(SMALL).initialize()
    with pytest.raises(InputError, match="texts of 53 tokens; this model reads 52"):
        model.encode_text(torch.ones(1, 53, dtype=torch.int32))
    assert build_model(model.state_dict(), replace(SMALL, context_length=64)).context_length == 64
    with pytest.raises(InputError, match="context_length 65 is more than the 64 positions"):
        build_model(model.state_dict(), replace(SMALL, context_length=65))


def test_random_weights_keep_the_variance_and_have_berts_embeddings():
    """Outputs of layers are as large as their inputs; embeddings are BERT's, 0.02 (Devlin et al.
    2019, whose code has it as `initializer_range`)."""
    torch.manual_seed(0)
    model = CLIP(SMALL).initialize()
    for name, module in model.bert.named_modules():
        if isinstance(module, torch.nn.Linear):
            outputs = module(torch.randn(256, module.in_features))
            assert outputs.std().item() == pytest.approx(1, rel=0.1), name
            assert not module.bias.any(), name
        elif isinstance(module, torch.nn.Embedding):
            margin = 5 * module.weight.numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(0.02, rel=margin), name
