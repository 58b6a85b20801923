"""Low-rank changes against their definition: a plain model whose matrices are W + B A."""

import copy

import pytest
import torch
from torch.func import functional_call

from models.clip_utils import create_model, load
from models.errors import InputError
from models.lora import add_lora, merged
from utils.runs.checkpoint import save_checkpoint, save_weights
from utils.training.layer_groups import freeze
from utils.training.optimizer import parameter_groups

TEXTS = ["a red bird", "two boats on a lake in the evening", "雪"]
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64).sin()


def outputs(model, images=IMAGES):
    return model.encode_image(images), model.encode_text(model.tokenize(TEXTS))


def adapted(rank, dtype=torch.float64, name="ViT-demo"):
    """A model before and after `add_lora`, with changes that are not zero any more."""
    torch.manual_seed(0)
    plain = create_model(name).to(dtype)
    model = copy.deepcopy(plain)
    add_lora(model, rank)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            torch.nn.init.normal_(parameter, std=0.05)
    return plain, model


def matrices(plain, factors):
    """W + 8 / rank B A for each matrix; queries, keys and values have changes of their own."""
    weights = dict(plain.named_parameters())
    for name in list(weights):
        owner = name.removesuffix(".weight").removesuffix(".in_proj_weight")
        if f"{owner}.lora.a" in factors and name != f"{owner}.bias":
            parts = zip(factors[f"{owner}.lora.a"], factors[f"{owner}.lora.b"], strict=True)
            weights[name] = weights[name].detach() + torch.cat(
                [8 / len(a) * b @ a for a, b in parts]
            )
    return weights


def test_features_and_gradients_are_those_of_matrices_with_the_product_added():
    plain, model = adapted(rank=3)
    found = outputs(model, IMAGES.double())
    sum(x.square().sum() for x in found).backward()

    factors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()
               if ".lora." in n}  # fmt: skip
    weights = matrices(plain, factors)
    assert sum(not torch.equal(w, plain.get_parameter(n)) for n, w in weights.items()) == 2 * 3 * 4
    images = functional_call(plain.visual, _below(weights, "visual."), (IMAGES.double(),))
    texts = _EncodesText(plain)
    texts = functional_call(
        texts, {f"model.{n}": w for n, w in weights.items()}, (plain.tokenize(TEXTS),)
    )
    for mine, theirs in zip(found, (images, texts), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    (images.square().sum() + texts.square().sum()).backward()
    for name, factor in factors.items():
        gradient = model.get_parameter(name).grad
        assert (gradient - factor.grad).norm() <= 1e-9 * factor.grad.norm(), name
        assert gradient.norm() > 0


def _below(weights, prefix):
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


class _EncodesText(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.encode_text(tokens)


@pytest.mark.parametrize("rank", [4, 16])
def test_the_first_factor_keeps_the_variance_of_what_it_takes(rank):
    """Whatever the rank and the width, so that the same rate suits all of them."""
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    add_lora(model, rank)
    for name, factor in model.named_parameters():
        if name.endswith("lora.a"):
            outputs = torch.randn(256, factor.shape[-1]) @ factor.detach().flatten(0, 1).T
            assert outputs.std().item() == pytest.approx(1, rel=0.1), name


def test_the_start_is_the_model_bit_for_bit():
    plain = create_model("ViT-demo")
    model = copy.deepcopy(plain)
    add_lora(model, 4)
    assert all(map(torch.equal, outputs(model), outputs(plain)))
    weights = merged(model.state_dict())
    assert weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("name", ["ViT-demo", "cn-demo"])  # the second has BERT as text tower
def test_weights_of_a_run_and_of_its_checkpoint_are_merged_and_plain(tmp_path, name):
    plain, model = adapted(rank=2, dtype=torch.float32, name=name)
    expected = outputs(model)
    save_weights(model, tmp_path / "plain.pth")  # in float16
    saved = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert saved.keys() == plain.state_dict().keys()
    save_checkpoint(tmp_path / "checkpoint.pth", arguments={}, average=None,
                    model=model.state_dict())  # fmt: skip
    for file, tolerance in (("plain.pth", 2e-3), ("checkpoint.pth", 1e-5)):
        loaded, _ = load(tmp_path / file, "cpu")
        for found, feature in zip(outputs(loaded), expected, strict=True):
            assert (found - feature).norm() <= tolerance * feature.norm(), file


@pytest.mark.parametrize("name, rank", [("ViT-demo", 1), ("ViT-demo", 5), ("cn-demo", 2)])
def test_what_learns_are_two_factors_of_each_matrix(name, rank):
    """The models have three blocks in each tower, with an MLP four times as wide."""
    model = create_model(name)
    add_lora(model, rank)
    learned = [p for group in parameter_groups(model, 0.9, 0.1) for p in group["params"]]
    widths = model.config.vision_width, model.config.transformer_width
    of_blocks = [rank * (3 * (w + w) + (w + w) + 2 * (w + 4 * w)) for w in widths]
    assert sum(p.numel() for p in learned) == 3 * sum(of_blocks)


def test_what_is_locked_has_no_change_and_a_resnet_no_transformer():
    model = create_model("ViT-demo")
    freeze(model, "image", unlocked=1)
    freeze(model, "text", unlocked=0)
    add_lora(model, 2)
    names = {n.rpartition(".lora.")[0] for n, p in model.named_parameters() if p.requires_grad}
    block = "visual.transformer.resblocks.2"
    layers = ("attn", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"{block}.{layer}" for layer in layers}
    with pytest.raises(InputError, match=r"--lora is for CLIP's own ViTs"):
        add_lora(create_model("RN50", 32), 2)
