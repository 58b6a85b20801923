"""Layers by their distance from the features: locking and layer-wise learning rates."""

import weakref
from dataclasses import replace

import pytest
import torch

from models.clip import CLIP
from models.clip_utils import create_model
from models.errors import InputError
from models.weights.registry import CONFIGS
from utils.training.layer_groups import distance_from_end, freeze, tower_of, train_mode
from utils.training.optimizer import parameter_groups, set_learning_rate


def small_resnet():
    config = replace(
        CONFIGS["RN50"], image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=8,
        transformer_layers=2, vocab_size=100,
    )  # fmt: skip
    return CLIP(config).initialize()


def test_distances_count_the_blocks_from_the_features():
    distances = distance_from_end(create_model("ViT-demo"))  # three blocks in each tower
    for prefix, first in (("visual.", "conv1.weight"), ("", "token_embedding.weight")):
        last = "proj" if prefix else "text_projection"
        norm = "ln_post.bias" if prefix else "ln_final.bias"
        assert distances[prefix + last] == distances[prefix + norm] == 0
        for block in range(3):
            assert distances[f"{prefix}transformer.resblocks.{block}.ln_1.weight"] == 3 - block
        assert distances[prefix + first] == distances[prefix + "positional_embedding"] == 4
    assert distances["logit_scale"] == 0 and distances["visual.ln_pre.weight"] == 4
    resnet = distance_from_end(small_resnet())
    assert resnet["visual.attnpool.c_proj.weight"] == 0 and resnet["visual.conv1.weight"] == 5
    assert [resnet[f"visual.layer{s}.0.conv1.weight"] for s in (4, 3, 2, 1)] == [1, 2, 3, 4]
    assert resnet["transformer.resblocks.0.ln_1.bias"] == 2


def test_distances_count_the_blocks_of_bert():
    distances = distance_from_end(create_model("cn-demo"))  # three blocks
    for block in range(3):
        for part in ("attention.self.key", "attention.output.LayerNorm", "output.dense"):
            assert distances[f"bert.encoder.layer.{block}.{part}.bias"] == 3 - block
    assert {d for name, d in distances.items() if name.startswith("bert.embeddings.")} == {4}
    assert distances["text_projection"] == 0 and tower_of("bert.encoder.layer.0.output") == "text"
    model = create_model("cn-demo")
    freeze(model, "text", 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_text = {name for name in trained if tower_of(name) == "text"} - {"logit_scale"}
    last = {name for name in distances if name.startswith("bert.encoder.layer.2.")}
    assert of_text == last | {"text_projection"}


def outputs(model):
    images = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    tokens = torch.tensor([[49406, 5, 49407], [49406, 49407, 0]])
    return model.encode_image(images), model.encode_text(tokens)


@pytest.mark.parametrize("unlocked, trained", [(0, 0), (1, 1), (3, 3)])
def test_a_locked_tower_is_what_it_was_but_for_its_last_blocks(unlocked, trained):
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    freeze(model, "image", unlocked)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.9, 0.1), lr=1e-2)
    image_features, text_features = outputs(model)
    (image_features @ text_features.T).square().sum().backward()
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name.split(".")[3] for name in moved if name.startswith("visual.transformer")}
    assert blocks == {str(block) for block in range(3 - trained, 3)}
    assert ("visual.proj" in moved) == (trained > 0)
    assert "visual.conv1.weight" not in moved and "token_embedding.weight" in moved


class Cached:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor, module):
        self.tensor = tensor
        self.module = module  # the one that was called last when it was kept


def kept_for(model, encode):
    """What is kept for the backward pass of `encode()`."""
    called, kept = [], weakref.WeakSet()
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))

    def distillation(tensor):
        one = Cached(tensor, called[-1])
        kept.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(distillation, lambda one: one.tensor):
        features = encode()
    found = list(kept)  # what is not let go again, as inputs of what autograd has no part in are
    return features, found


@pytest.mark.parametrize("unlocked, checkpointing", [(0, False), (0, True), (1, False), (2, False)])
@pytest.mark.parametrize(
    "name, tower", [("ViT-demo", "image"), ("ViT-demo", "text"), ("cn-demo", "text")]
)
def test_what_is_locked_keeps_no_activations_no_gradients_and_no_moments(
    name, tower, unlocked, checkpointing
):
    model = create_model(name)
    freeze(model, tower, unlocked)
    if checkpointing:
        model.enable_grad_checkpointing()
    train_mode(model)
    side = model.visual.input_resolution
    encode = {
        "image": lambda: model.encode_image(torch.rand(2, 3, side, side)),
        "text": lambda: model.encode_text(model.tokenize(["a dog", "birds"])),
    }
    distances = distance_from_end(model)
    features, kept = kept_for(model, encode[tower])
    assert bool(kept) == features.requires_grad == (unlocked > 0)
    for module in {one.module for one in kept}:
        # An activation function has no weights; it is in the block of what was called before it.
        owned = [distances[n] for n in distances if n.startswith(f"{module}.")]
        assert max(owned, default=0) <= unlocked, module

    optimizer = torch.optim.AdamW(parameter_groups(model, 0.9, 0.1), lr=1e-2)
    torch.cat([encode["image"](), encode["text"]()]).sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        assert parameter.requires_grad or parameter.grad is None
        assert parameter.requires_grad or parameter not in optimizer.state


def test_more_blocks_than_there_are_cannot_be_left_open():
    with pytest.raises(InputError, match="--lock_text 4: this tower has 3 blocks"):
        freeze(create_model("ViT-demo"), "text", 4)


@pytest.mark.parametrize("is_from_scratch", [True, False])
def test_only_batch_norms_that_learn_from_scratch_change_their_statistics(is_from_scratch):
    model = small_resnet()
    freeze(model, "image", 1)
    train_mode(model, is_from_scratch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.visual(torch.randn(4, 3, 32, 32)).sum().backward()
    moved = {
        name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])
    }
    assert bool(moved) == is_from_scratch
    assert all(name.startswith("visual.layer4.") for name in moved)
    assert model.visual.layer4[0].bn3.weight.grad.norm() > 0  # which learns in either case


def test_a_layers_rate_is_that_of_the_next_times_the_decay():
    """One step of plain SGD on the sum of all parameters moves each by its layer's rate."""
    model = create_model("ViT-demo")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.0, 0.0, layer_decay=0.5)
    optimizer = torch.optim.SGD(
        [{k: g[k] for k in ("params", "rate_factor")} for g in groups], lr=1.0
    )
    sum(p.double().sum() for p in model.parameters()).backward()
    set_learning_rate(optimizer, 0.25)
    optimizer.step()
    distances = distance_from_end(model)
    for name, parameter in model.named_parameters():
        expected = torch.full_like(parameter, 0.25 * 0.5 ** distances[name])
        torch.testing.assert_close(before[name] - parameter, expected, atol=1e-6, rtol=1e-4)
