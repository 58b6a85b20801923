"""Gradients chunk by chunk against those of the whole batch at once."""

import math

import numpy as np
import pytest
import torch
from tiny import NAMED, tiny_clip

from models.clip_utils import tokenize
from models.tokens import TokenizedTexts
from utils.data.augment import draw_recolourings
from utils.flickr8k_dataloader import Batch
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.runs.checkpoint import save_weights
from utils.training.distillation import TUNED_SCALE, Distillation, distill_from_start
from utils.training.gradients import accumulate_gradients
from utils.training.layer_groups import TOWERS, freeze, train_mode

CPU = torch.device("cpu")


def small(name):
    return tiny_clip(NAMED[name])


def batch_of(n, k):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    crops = torch.tensor([[0.96, 0.02, -0.03]]).repeat(n, 1)
    ids = torch.arange(n * k) % (n * k - 2)  # the last two are the first two once more
    tokens = tokenize([f"{'a red ' * (i % 5)}bird {i}" for i in ids])
    colours = draw_recolourings(n, np.random.default_rng(n))
    others = tokenize([f"a green tree {i}" for i in range(n // 2 * k)])
    altered = Batch(images[1::2], crops[1::2], others, colours=colours[1::2])
    return Batch(images, crops, tokens, ids.view(n, k), altered=altered)


def distillation_from(start, weight, towers=TOWERS):
    """Of all words."""
    return Distillation(start, weight, towers, torch.tensor([], dtype=torch.int64))


def gradients(model, batch, precision, chunk, distillation=None):
    model.zero_grad()
    loss = accumulate_gradients(model, batch, precision, ALONE, chunk, distillation)
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        # A gradient that is zero but for rounding (of a key's bias) has no direction to compare.
        assert (found[name] - gradient).norm() <= max(1e-5 * gradient.norm(), 1e-7 * total), name


@pytest.mark.parametrize("n, k, chunk", [(12, 1, 5), (12, 3, 4), (7, 2, 1), (6, 1, 6), (6, 1, 99)])
@pytest.mark.parametrize("locked", [(), ("image",), ("text",)])
@pytest.mark.parametrize("weight", [None, 3.0])
def test_chunks_bring_the_gradients_of_the_whole_batch(n, k, chunk, locked, weight):
    torch.manual_seed(0)
    model = small("ViT-tiny")
    for tower in locked:
        freeze(model, tower, unlocked=0)
    precision = Precision(CPU, use_amp=False)
    learned = [tower for tower in TOWERS if tower not in locked]
    distillation = distillation_from(small("ViT-tiny"), weight, learned) if weight else None
    loss, expected = gradients(model, batch_of(n, k), precision, None, distillation)
    chunked_loss, found = gradients(model, batch_of(n, k), precision, chunk, distillation)
    assert chunked_loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_locked_tower_has_no_second_forward_pass(monkeypatch, tower):
    model = small("ViT-tiny")
    freeze(model, tower, unlocked=0)
    encoded = []
    for name in ("image", "text"):
        encode = getattr(model, f"encode_{name}")
        monkeypatch.setattr(
            model, f"encode_{name}", lambda x, n=name, e=encode: encoded.append(n) or e(x)
        )
    gradients(model, batch_of(6, 1), Precision(CPU, use_amp=False), chunk=2)
    (other,) = {"image", "text"} - {tower}
    assert (encoded.count(tower), encoded.count(other)) == (3, 6)


def test_chunks_bring_the_gradients_of_the_whole_batch_to_a_chinese_clip():
    torch.manual_seed(0)
    model = small("cn-tiny")
    freeze(model, "text", unlocked=1)
    precision, batch = Precision(CPU, use_amp=False), batch_of(6, 2)
    texts = [f"{'一只' * (i % 5)}鸟 {i}" for i in range(12)]
    batch = batch._replace(tokens=model.tokenize(texts))
    loss, expected = gradients(model, batch, precision, None)
    chunked_loss, found = gradients(model, batch, precision, 4)
    assert chunked_loss == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradients(found, expected)


def normalised(features):
    return features / features.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("k", [1, 2])
def test_distillation_adds_the_mean_squared_distance_to_the_features_of_the_start(k):
    """Its gradients are the difference that a weight makes; the loss that is told is without it."""
    torch.manual_seed(0)
    model, start = small("ViT-tiny"), small("ViT-tiny")
    batch = batch_of(5, k)
    precision = Precision(CPU, use_amp=False)
    loss, without = gradients(model, batch, precision, None)
    distilled_loss, found = gradients(model, batch, precision, None, distillation_from(start, 7.0))
    assert torch.equal(loss, distilled_loss)

    model.zero_grad()
    images, tokens = batch.altered.augmented_images(model.preprocess), batch.altered.tokens
    pairs = [(m.encode_image(images), m.encode_text(tokens)) for m in (model, start)]
    distances = [
        torch.stack([(a - b).square().sum() for a, b in zip(*map(normalised, tower), strict=True)])
        for tower in zip(*pairs, strict=True)
    ]
    (7.0 * (distances[0].mean() + distances[1].mean())).backward()
    total = torch.stack([g.norm() for g in found.values()]).norm()
    for name, gradient in found.items():
        added = model.get_parameter(name).grad
        expected = without[name] if added is None else without[name] + added
        assert (gradient - expected).norm() <= max(1e-5 * expected.norm(), 1e-7 * total), name


def test_the_starting_model_shares_the_frozen_parameters_and_keeps_the_others(tmp_path):
    model = small("ViT-tiny")
    freeze(model, "text", unlocked=1)
    file = tmp_path / "start_weights.pth"
    captions = TokenizedTexts(model.tokenizer, ["a bird"], model.context_length)
    save_weights(model, file)
    before = {name: tensor.half().float() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad
    distillation = distill_from_start(model, file, 1.0, captions)
    assert distillation.towers == ["image", "text"]
    for name, parameter in distillation.start.named_parameters():
        own = model.get_parameter(name)
        assert not parameter.requires_grad
        assert (parameter.data_ptr() == own.data_ptr()) == (not own.requires_grad), name
        assert not own.requires_grad or torch.equal(parameter, before[name]), name
    freeze(model, "text", unlocked=0)
    of_a_stream = distill_from_start(model, file, 1.0, None)  # which may have any word
    assert of_a_stream.towers == ["image"] and not len(of_a_stream.unused)


def test_distillation_weighs_as_much_beside_the_loss_at_any_logit_scale(tmp_path):
    """Between unit vectors, half the squared distance is 1 minus the cosine, and the scale times
    that is what the distance can change in a logit."""
    model, file = small("ViT-tiny"), tmp_path / "start_weights.pth"
    weights = []
    for scale in (TUNED_SCALE, 10 * TUNED_SCALE):
        torch.nn.init.constant_(model.logit_scale, math.log(scale))
        save_weights(model, file)
        captions = TokenizedTexts(model.tokenizer, ["a bird"], model.context_length)
        weights.append(distill_from_start(model, file, 6.0, captions).weight)
    assert weights == pytest.approx([6.0, 60.0], rel=1e-2)


@pytest.mark.parametrize("name", ["ViT-tiny", "cn-tiny"])
def test_distillation_moves_no_word_that_the_captions_do_not_have(name, tmp_path):
    """It sees others, in place of the captions' own."""
    torch.manual_seed(0)
    model, file = small(name), tmp_path / "start_weights.pth"
    save_weights(small(name), file)
    texts = TokenizedTexts(model.tokenizer, ["一只鸟", "a bird", "two birds"], model.context_length)
    captions = texts[:]
    others = model.tokenize(["树 a", "鸟 tree", "three trees"])
    batch = batch_of(3, 1)._replace(tokens=captions, texts=None)
    batch = batch._replace(altered=batch._replace(tokens=others))
    words = model.bert.embeddings.word_embeddings if name == "cn-tiny" else model.token_embedding
    for chunk in (None, 1):
        distillation = distill_from_start(model, file, 1e3, texts)
        gradients(model, batch, Precision(CPU, use_amp=False), chunk, distillation)
        moved = words.weight.grad.any(dim=1).nonzero().flatten()
        assert set(moved.tolist()) == set(captions.flatten().tolist()) - {0}


@pytest.mark.parametrize("chunk", [None, 2])
def test_equal_texts_are_no_wrong_answers(chunk):
    """Where all images have the one text, nothing is wrong: the loss is zero, and so is the
    gradient."""
    model = small("ViT-tiny")
    batch = batch_of(6, 1)
    batch = batch._replace(tokens=tokenize(["a bird"] * 6), texts=torch.full((6, 1), 3))
    loss, found = gradients(model, batch, Precision(CPU, use_amp=False), chunk)
    assert loss == pytest.approx(0, abs=1e-6)
    assert all(gradient.norm() < 1e-5 for gradient in found.values())


def test_chunks_in_mixed_precision_bring_the_gradients_of_the_whole_batch_to_its_rounding():
    """The rounding of bfloat16 itself is the measure: chunks may not be further from float32 than
    the whole batch in bfloat16 is."""
    torch.manual_seed(0)
    model = small("ViT-tiny")
    batch = batch_of(12, 2)
    _, exact = gradients(model, batch, Precision(CPU, use_amp=False), None)
    mixed = Precision(CPU, use_amp=True)
    _, whole = gradients(model, batch, mixed, None)
    _, chunked = gradients(model, batch, mixed, 5)

    def distance(a, b):
        return torch.stack([(a[name].float() - b[name].float()).norm() for name in a]).norm()

    assert distance(chunked, exact) <= 1.5 * distance(whole, exact)
    assert distance(whole, exact) > 0


def test_a_scaled_loss_scales_the_gradients_of_every_chunk():
    torch.manual_seed(0)
    model = small("ViT-tiny")
    precision = Precision(CPU, use_amp=False)
    _, expected = gradients(model, batch_of(6, 1), precision, 4)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, scaled = gradients(model, batch_of(6, 1), precision, 4)
    for name, gradient in expected.items():
        torch.testing.assert_close(scaled[name] / 2**10, gradient, rtol=1e-3, atol=1e-7)


def test_mixed_precision_sees_the_same_images_as_float32(monkeypatch):
    """Cropped, and for distillation recoloured: bfloat16 would round places and colours."""
    model, seen = small("ViT-tiny"), []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda images: seen.append(images) or encode(images))
    distillation = distillation_from(model, 1.0)
    for use_amp in (False, True):
        gradients(model, batch_of(4, 1), Precision(CPU, use_amp), None, distillation)
    for mixed, exact in zip(seen[len(seen) // 2 :], seen[: len(seen) // 2], strict=True):
        assert torch.equal(mixed, exact)


def test_mixed_precision_computes_the_same_features_with_and_without_gradients(monkeypatch):
    """Or gradient caching would take the loss of one model and the gradients of another, and the
    starting model would be at a distance from itself."""
    torch.manual_seed(0)
    model, features = small("ViT-tiny"), []
    train_mode(model)
    for name in ("encode_image", "encode_text"):
        encode = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda x, e=encode: features.append(e(x)) or features[-1]
        )  # fmt: skip
    mixed, batch = Precision(CPU, use_amp=True), batch_of(6, 2)
    gradients(model, batch, mixed, 3)
    first, second = features[:4], features[4:]  # images, then captions; two chunks of each
    assert not first[0].requires_grad and second[0].requires_grad
    for without, with_gradients in zip(first, second, strict=True):
        assert torch.equal(without, with_gradients)
    _, alone = gradients(model, batch, mixed, None)
    _, found = gradients(model, batch, mixed, None, distillation_from(model, 1e3))
    assert all(torch.equal(found[name], gradient) for name, gradient in alone.items())
