"""Our CLIP compared with those of open_clip and transformers, given the same weights."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import get_tokenizer
from open_clip.loss import ClipLoss
from peers import TEXT, open_clip_model, to_transformers, transformers_model
from tiny import tiny_clip
from torch import nn

from models import CLIP, available_models, build_model, load, tokenize
from models.clip import MAX_LOGIT_SCALE
from models.clip_utils import create_model
from models.config import TEXT_TOWERS
from models.errors import InputError
from models.tokens import clip_tokenizer
from models.weights.registry import CONFIGS
from utils import contrastive_loss

CAPTIONS = [
    "a brown dog runs across a wet beach with a red ball in its mouth",
    "two climbers",
    "一个穿红色衣服的女孩在草地上奔跑。",
    "a man in a hat is sitting on a bench, reading a newspaper, while pigeons walk around his feet "
    "and a child on a bicycle looks at them from the other side of the fountain in the old square",
]
CASES = {
    "ViT-B/16": {"vision_layers": 2, "text_layers": 2},
    "ViT-L/14@336px": {"vision_layers": 2, "text_layers": 2},
    "RN50": {"vision_layers": (1, 2, 1, 1), "text_layers": 2},
}


LARGE = {"ViT-L/14@336px"}


def inputs(side):
    captions = CAPTIONS[-2:] if side > 224 else CAPTIONS
    images = torch.randn(len(captions), 3, side, side, generator=torch.Generator().manual_seed(1))
    return images, tokenize(captions)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in CASES],
)
def pair(request):
    """(our model, open_clip's model, images, tokens) of a case, with the words of the captions as
    vocabulary."""
    images, tokens = inputs(CONFIGS[request.param].image_resolution)
    words, tokens = tokens.unique(return_inverse=True)
    theirs = open_clip_model(request.param, **CASES[request.param], vocabulary=len(words))
    ours = build_model({k: v.clone() for k, v in theirs.state_dict().items()})
    return ours, theirs, images, tokens.int()


@pytest.fixture(scope="module")
def learned(pair):
    """(our features, logits, loss and gradients)"""
    ours, _, images, tokens = pair
    with torch.no_grad():
        logits = ours(images, tokens)
    features = ours.encode_image(images), ours.encode_text(tokens)
    loss = contrastive_loss(*features, ours.logit_scale)
    found = {name: g.clone() for name, g in gradients(ours, loss).items()}
    return [feature.detach() for feature in features], logits, loss.detach(), found


@pytest.fixture(scope="module")
def expected(pair):
    """(features, logits, loss and gradients of open_clip's model)"""
    _, theirs, images, tokens = pair
    features = theirs.encode_image(images), theirs.encode_text(tokens)
    ends = *(F.normalize(feature, dim=-1) for feature in features), theirs.logit_scale.exp()
    logits, loss = [each.detach() for each in ClipLoss().get_logits(*ends)], ClipLoss()(*ends)
    return (
        [feature.detach() for feature in features],
        logits,
        loss.detach(),
        gradients(theirs, loss),
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_gradients_equal(ours, theirs):
    """Each gradient may differ by 1e-4 of its norm. The gradient of the keys' bias is zero except
    for rounding, because that bias changes all scores of a query equally, which softmax ignores. So
    1e-7 of the largest norm is allowed as well."""
    largest = max(g.norm() for g in theirs.values())
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-7 * largest, (name, error, gradient.norm())


@pytest.mark.slow
def test_features_of_a_whole_model_equal_open_clip():
    theirs = open_clip_model("ViT-B/32")
    ours = build_model(theirs.state_dict())
    images, tokens = inputs(ours.visual.input_resolution)
    with torch.no_grad():
        for found, expected in (
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens)),
        ):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_features_and_logits_equal_open_clip(learned, expected):
    for a, b in zip((*learned[0], *learned[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_normalized_features_equal_open_clip(pair, expected):
    ours, _, images, tokens = pair
    with torch.no_grad():
        mine = ours.encode_image(images, normalize=True), ours.encode_text(tokens, normalize=True)
    for found, features in zip(mine, expected[0], strict=True):
        torch.testing.assert_close(found, F.normalize(features, dim=-1), atol=1e-5, rtol=1e-5)


def test_normalized_features_of_mixed_precision_are_float32():
    model = create_model("ViT-demo")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = model.encode_text(tokenize(CAPTIONS), normalize=True)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(CAPTIONS)))


def test_loss_and_gradients_equal_open_clip(learned, expected):
    torch.testing.assert_close(learned[2], expected[2], atol=1e-4, rtol=1e-4)
    assert_gradients_equal(learned[3], expected[3])


def test_features_loss_and_gradients_equal_transformers(pair, learned):
    ours, _, images, tokens = pair
    if "visual.proj" not in ours.state_dict():
        pytest.skip("transformers has no CLIP with a ResNet")
    theirs = transformers_model(ours.state_dict())
    output = theirs(
        input_ids=tokens.long(), pixel_values=images, return_loss=True,
        attention_mask=torch.ones_like(tokens),
    )  # fmt: skip
    (image_features, text_features), logits, loss, found = learned
    for a, b in [
        (F.normalize(image_features, dim=-1), output.image_embeds),
        (F.normalize(text_features, dim=-1), output.text_embeds),
        (logits[0], output.logits_per_image),
        (loss, output.loss),
    ]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert_gradients_equal(to_transformers(found), gradients(theirs, output.loss))


def test_padding_length_does_not_matter(pair):
    ours, _, _, tokens = pair
    longest = int(tokens.argmax(1).max()) + 1
    with torch.no_grad():
        whole, cut = ours.encode_text(tokens), ours.encode_text(tokens[:, :longest])
        alone = torch.cat([ours.encode_text(row[None]) for row in tokens])
    torch.testing.assert_close(whole, cut, atol=0, rtol=0)
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_tokens_after_the_end_token_do_not_matter(pair):
    ours, theirs, _, tokens = pair
    noisy = tokens.clone()
    for row in noisy:
        row[int(row.argmax()) + 1 :] = 1
    with torch.no_grad():
        assert torch.equal(ours.encode_text(noisy), ours.encode_text(tokens))
        whole, expected = ours.encode_text_grid(noisy), theirs.encode_text(tokens)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_same_bits_every_time():
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    images = torch.randn(32, 3, 64, 64)
    tokens = tokenize([f"{'a dog ' * (n % 9)}runs" for n in range(32)])

    def loss():
        image_features, text_features = model.encode_image(images), model.encode_text(tokens)
        return contrastive_loss(image_features, text_features, model.logit_scale)

    first = {name: g.clone() for name, g in gradients(model, loss()).items()}
    for _ in range(5):
        again = gradients(model, loss())
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_gradient_checkpointing_changes_no_gradient(pair, learned):
    ours, _, images, tokens = pair
    passes = []
    block = ours.transformer.resblocks[0]
    hook = block.register_forward_pre_hook(lambda *_: passes.append(1))
    ours.enable_grad_checkpointing()
    features = ours.encode_image(images), ours.encode_text(tokens)
    loss = contrastive_loss(*features, ours.logit_scale)
    assert_gradients_equal(gradients(ours, loss), learned[-1])
    assert len(passes) == 2  # in the forward pass, and again in the backward pass
    hook.remove()
    for module in ours.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_inferred_from_its_shapes(name):
    with torch.device("meta"):
        expected = CLIP(CONFIGS[name])
    from models.weights.architecture import infer_config

    assert infer_config(expected.state_dict()) == CONFIGS[name]


@pytest.mark.parametrize("name", available_models())
def test_every_published_architecture_has_open_clip_keys_and_shapes(name):
    with torch.device("meta"):
        ours = CLIP(CONFIGS[name]).state_dict()
    config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
    config.pop("quick_gelu", None)
    with torch.device("meta"):
        theirs = open_clip.model.CLIP(**config, quick_gelu=True).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_model_from_scratch_has_clips_logit_scale_and_all_gradients():
    torch.manual_seed(0)
    model = create_model("ViT-demo")
    assert model.logit_scale.item() == pytest.approx(2.6592600)  # log(1 / 0.07)
    images = torch.randn(8, 3, 64, 64)
    tokens = get_tokenizer("ViT-B-32")([f"a photo of {n} dogs" for n in range(8)])
    loss = contrastive_loss(
        model.encode_image(images), model.encode_text(tokens), model.logit_scale
    )
    assert all(g.isfinite().all() and g.any() for g in gradients(model, loss).values())


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["ViT-demo"],
        replace(CONFIGS["RN50"], embed_dim=96, image_resolution=64, vision_layers=(1, 2, 1, 1),
                vision_width=16, transformer_width=128, transformer_mlp_width=512,
                transformer_heads=2, transformer_layers=3),
    ],
    ids=["ViT", "ResNet"],
)  # fmt: skip
def test_a_model_from_scratch_is_drawn_as_open_clips_is(config):
    """Tensor by tensor: what is constant there, and standard deviations. The blocks of its ViT are
    left as torch draws them; ours are GPT-2's, as in its text tower."""
    torch.manual_seed(0)
    ours = CLIP(config).initialize().state_dict()
    layers, width = config.vision_layers, config.vision_width
    vision = {"layers": layers, "width": width, "patch_size": config.vision_patch_size,
              "image_size": config.image_resolution}  # fmt: skip
    text = TEXT | {"width": config.transformer_width, "heads": config.transformer_heads,
                   "layers": config.transformer_layers}  # fmt: skip
    theirs = open_clip.model.CLIP(config.embed_dim, vision, text).state_dict()
    expected = {key: tensor.float().std(correction=0).item() for key, tensor in theirs.items()}
    for key in theirs:
        if key.startswith("visual.transformer.") and key.endswith("weight") and "ln_" not in key:
            expected[key] = width**-0.5
            if key.endswith(("out_proj.weight", "c_proj.weight")):
                expected[key] *= (2 * layers) ** -0.5
            elif key.endswith("c_fc.weight"):
                expected[key] *= 2**-0.5
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if expected[key] == 0:
            assert torch.equal(tensor, theirs[key]), key
        else:  # within five standard errors of a difference
            margin = 5 * tensor.numel() ** -0.5
            assert tensor.std().item() == pytest.approx(expected[key], rel=margin), key


class BagOfWords:
    """A text tower whose output is the embedding of the first token."""

    causal, tokenizer = False, staticmethod(clip_tokenizer)

    def add_to(self, model, config):
        model.words = nn.Embedding(config.vocab_size, config.transformer_width)

    def initialize(self, model):
        nn.init.ones_(model.words.weight)

    def last_tokens(self, tokens):
        return tokens.argmax(dim=1)

    def encode(self, model, ids, positions, layout):
        return layout.pool(model.words(ids))


def test_a_third_text_tower_is_one_module_and_a_line_of_the_table(monkeypatch):
    module = ModuleType("bag_of_words")
    module.TextTower = BagOfWords
    monkeypatch.setitem(sys.modules, "bag_of_words", module)
    monkeypatch.setitem(TEXT_TOWERS, "words", "bag_of_words")
    model = CLIP(replace(CONFIGS["ViT-demo"], text_tower="words")).initialize()
    expected = model.text_projection.sum(dim=0).expand(len(CAPTIONS), -1)
    torch.testing.assert_close(model.encode_text(tokenize(CAPTIONS)), expected)


@pytest.mark.slow  # torch's compiler takes long to import
def test_training_compiles_a_graph_for_each_size_of_batch_and_one_for_all_texts(monkeypatch):
    """Scoring, whose last batch is smaller, would make the size variable for good."""
    graphs = []  # the shapes of the inputs that are no parameters

    def note_shapes(graph, inputs):
        examples = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        tensors = [e for e in examples if hasattr(e, "shape") and not isinstance(e, nn.Parameter)]
        graphs.append([list(tensor.shape) for tensor in tensors])
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note_shapes))
    model = tiny_clip()
    images = torch.randn(6, 3, 8, 8)
    tokens = torch.tensor([[5, 1, 6, 0, 0], [5, 1, 2, 6, 0], [5, 6, 0, 0, 0]] * 2)
    expected = model.encode_image(images), model.encode_text(tokens)
    model.compile_towers()
    for n in (6, 2):
        model.eval().encode_image(images[:n])
        model.encode_text(tokens[:n])
    assert not graphs
    for rows in (slice(6), slice(2), slice(6)):
        found = model.train().encode_image(images[rows]), model.encode_text(tokens[rows])
        for features, of_all in zip(found, expected, strict=True):
            torch.testing.assert_close(features, of_all[rows])
    of_images = [[[n, 3, 8, 8]] for n in (6, 2)]
    assert [shapes for shapes in graphs if len(shapes) == 1] == of_images
    (of_texts,) = (shapes for shapes in graphs if len(shapes) > 1)
    assert isinstance(of_texts[0][0], torch.SymInt)


def test_logit_scale_is_kept_below_a_hundred():
    model = create_model("ViT-demo")
    model.logit_scale.data.fill_(7.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    assert model.logit_scale.exp().item() == pytest.approx(100)


@pytest.mark.parametrize("name, side", [("ViT-demo", 96), ("RN50", 288)])
def test_another_resolution_interpolates_the_positional_embedding(name, side):
    """Compared with torch's bicubic interpolation, which open_clip uses for the same purpose."""
    weights = create_model(name).state_dict() if name == "ViT-demo" else None
    if weights is None:
        theirs = open_clip_model(name, vision_layers=(1, 1, 1, 1), text_layers=1)
        weights = theirs.state_dict()
    model = build_model(weights, input_shape=side)
    assert model.visual.input_resolution == side
    key = (
        "visual.positional_embedding"
        if name == "ViT-demo"
        else "visual.attnpool.positional_embedding"
    )
    old, new = weights[key], model.state_dict()[key]
    stride = 16 if name == "ViT-demo" else 32
    torch.testing.assert_close(new[0], old[0], atol=0, rtol=0)
    n = int((len(old) - 1) ** 0.5)
    for channel in (0, 5):
        grid = old[1:, channel].reshape(1, 1, n, n)
        expected = F.interpolate(grid, (side // stride,) * 2, mode="bicubic", antialias=True)
        torch.testing.assert_close(new[1:, channel], expected.flatten())
    assert model.encode_image(torch.zeros(1, 3, side, side)).shape == (1, model.embed_dim)


@pytest.mark.parametrize("side", [0, 8, 50])
def test_a_resolution_that_is_no_multiple_of_the_patch_size_is_refused(side):
    weights = create_model("ViT-demo").state_dict()
    with pytest.raises(InputError, match=r"--input_shape.*multiple of 16"):
        build_model(weights, input_shape=side)
    with pytest.raises(InputError, match="multiple of 16"):
        create_model("ViT-demo", input_shape=side)


def test_wrong_keys_are_listed_in_one_error():
    weights = create_model("ViT-demo").state_dict()
    del weights["visual.ln_post.bias"]
    weights["visual.extra"] = torch.zeros(1)
    weights["visual.ln_pre.bias"] = torch.zeros(7)
    with pytest.raises(InputError) as error:
        build_model(weights)
    message = str(error.value)
    assert "missing: visual.ln_post.bias" in message
    assert "unknown: visual.extra" in message
    assert "visual.ln_pre.bias [7] of floats instead of [192]" in message


def test_a_long_list_of_keys_is_cut():
    weights = create_model("ViT-demo").state_dict()
    with pytest.raises(InputError, match=r"unknown: x0, x1, .* and 997 more") as error:
        build_model(weights | {f"x{n}": torch.zeros(1) for n in range(1000)})
    assert len(str(error.value)) < 200


@st.composite
def damaged_weights(draw):
    """Weights of a small model. Some are missing, renamed, of another shape or type, or NaN."""
    weights = dict(tiny_clip().state_dict())
    for key in draw(
        st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=3, unique=True)
    ):
        tensor = weights.pop(key, torch.zeros(1))
        change = draw(st.sampled_from(["gone", "renamed", "shape", "cut", "type", "NaN", "same"]))
        if change == "renamed":
            weights[draw(st.text(max_size=9)) + key] = tensor
        elif change == "shape":
            weights[key] = draw(st.lists(st.integers(0, 70), max_size=4).map(torch.zeros))
        elif change == "cut":
            weights[key] = tensor[: draw(st.integers(0, 64))] if tensor.ndim else tensor
        elif change == "type":
            weights[key] = tensor.to(draw(st.sampled_from([torch.int64, torch.bool, torch.half])))
        elif change == "NaN":
            weights[key] = torch.full_like(tensor, torch.nan)
        elif change == "same":
            weights[key] = tensor
    return weights


@settings(max_examples=150)
@given(damaged_weights(), st.sampled_from([None, 16, 24]))
def test_damaged_weights_give_a_working_model_or_a_one_line_error(weights, side):
    try:
        model = build_model(weights, input_shape=side)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 2000
        return
    side = model.visual.input_resolution
    last = model.token_embedding.num_embeddings - 1  # fewer tokens if that tensor was cut
    tokens = torch.full((1, min(2, model.context_length)), last)
    with torch.no_grad():
        logits, _ = model(torch.zeros(1, 3, side, side), tokens)
    assert logits.shape == (1, 1)


@pytest.mark.parametrize(
    "name, near", [("ViT-B-32", "ViT-B/32"), ("vit-demo", "ViT-demo"), ("ViT-L/14-336px", "@336px")]
)
def test_an_unknown_name_gets_similar_names_suggested(name, near):
    with pytest.raises(InputError, match=rf"did you mean .*{near}.*\?.*RN50x64"):
        create_model(name)
    with pytest.raises(InputError, match=rf"did you mean .*{near}.*--list"):
        load(name, "cpu")


def test_the_demo_s_name_says_how_to_get_weights():
    with pytest.raises(InputError, match=r"no published weights.*--model ViT-demo"):
        load("ViT-demo", "cpu")


def test_a_name_unlike_all_others_gets_no_suggestion():
    with pytest.raises(InputError) as error:
        create_model("resnet")
    assert "did you mean" not in str(error.value)


def test_inputs_of_the_wrong_shape_are_named():
    model = create_model("ViT-demo")
    with pytest.raises(InputError, match=r"\[n, 3, 64, 64\]"):
        model.encode_image(torch.zeros(1, 3, 224, 224))
    with pytest.raises(InputError, match="78 tokens"):
        model.encode_text(torch.zeros(1, 78, dtype=torch.int32))
