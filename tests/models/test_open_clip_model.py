"""Models that open_clip builds, against open_clip: all of its descriptions, and what is done with
one of each family."""

import copy

import open_clip
import pytest
import timm
import torch
from open_clip import timm_model
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip_descriptions import DESCRIPTIONS, OWN
from open_clip_folders import (
    clipa,
    convnext,
    efficientnet_bert,
    save_random,
    siglip,
    unigram,
    wordpiece,
    worldwide,
)
from PIL import Image
from timm.models import vitamin
from torch import nn
from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

from models import load, open_clip_model
from models.convert import convert
from models.errors import InputError
from models.open_clip_model import OpenClipConfig
from models.weights.open_clip import any_description
from utils import contrastive_loss
from utils.machine.processes import Processes
from utils.training.layer_groups import (
    distance_from_end,
    freeze,
    frozen_towers,
    whole_batch_norms,
)

FAMILIES = {
    "SigLIP": siglip,
    "ConvNeXt": convnext,
    "EfficientNet and BERT": efficientnet_bert,
    "CLIPA": clipa,
    "MetaCLIP 2": worldwide,
}
TEXTS = ["a large red star", "There is a Disc, of the page!", "the heart " * 20, ""]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(open_clip's model, ours with the same weights, their folder)"""
    folder = tmp_path_factory.mktemp("models") / "model"
    theirs = FAMILIES[request.param](folder)
    return theirs, load(folder, "cpu")[0], folder


def inputs(model, n=2):
    generator = torch.Generator().manual_seed(0)
    side = model.visual.input_resolution
    return torch.randn(n, 3, side, side, generator=generator), model.tokenize(TEXTS[:n])


@torch.no_grad()
def assert_same_features(theirs, ours):
    images, tokens = inputs(ours)
    for found, expected in (
        (ours.encode_image(images), theirs.encode_image(images)),
        (ours.encode_text(tokens), theirs.encode_text(tokens.long())),
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def assert_same_gradients(theirs, ours):
    """Ours trains, theirs evaluates. Batch norms, which take their statistics from the batch in
    training, evaluate in both."""
    images, tokens = inputs(ours)
    features = (
        theirs.encode_image(images, normalize=True),
        theirs.encode_text(tokens.long(), normalize=True),
    )
    kind, bias = (ClipLoss, ()) if ours.logit_bias is None else (SigLipLoss, (theirs.logit_bias,))
    kind()(*features, theirs.logit_scale.exp(), *bias).backward()
    ours.train()
    for module in ours.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    features = ours.encode_image(images), ours.encode_text(tokens)
    contrastive_loss(*features, ours.logit_scale, logit_bias=ours.logit_bias).backward()
    names = {k.replace("text.", "", 1): p for k, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = names[name.replace("text.", "", 1)].grad
        if expected is None:  # BERT's pooler
            assert parameter.grad is None
        else:
            assert (parameter.grad - expected).norm() <= 1e-4 * (expected.norm() + 1e-3), name
    theirs.zero_grad()


def test_features_tokens_and_preprocessing_are_open_clips(pair):
    theirs, ours, folder = pair
    assert_same_features(theirs, ours)
    expected = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert ours.tokenize(TEXTS, truncate=True).equal(expected.int())
    with pytest.raises(InputError, match=r"text 0 has \d+ tokens, where 24 fit"):
        ours.tokenize(TEXTS[2])
    _, given = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    image = Image.effect_mandelbrot((90, 70), (-3, -2.5, 2, 2.5), 100)
    torch.testing.assert_close(ours.preprocess(image), given(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_has_the_gradients_of_open_clips_loss_without_dropout(pair, checkpointing):
    """Also where training would drop something at random."""
    theirs, _, folder = pair
    ours, _ = load(folder, "cpu")
    if checkpointing:
        ours.enable_grad_checkpointing()
    assert_same_gradients(theirs, ours)


def test_written_in_open_clips_format_it_is_open_clips_model(pair, tmp_path):
    theirs, ours, _ = pair
    convert(ours, tmp_path / "out", "open_clip")
    place = f"local-dir:{tmp_path / 'out'}"
    assert_same_features(open_clip.create_model(place).eval(), ours)
    assert open_clip.get_tokenizer(place)(TEXTS).equal(ours.tokenize(TEXTS, truncate=True).long())
    assert_same_features(theirs, load(tmp_path / "out", "cpu")[0])
    with pytest.raises(InputError, match="--format open_clip"):
        convert(ours, tmp_path / "other", "transformers")


def test_probabilities_of_a_siglip_are_each_labels_own(tmp_path):
    theirs = siglip(tmp_path / "model")
    ours, _ = load(tmp_path / "model", "cpu")
    images, tokens = inputs(ours)
    with torch.no_grad():
        logits, _ = theirs.get_logits(images, tokens)
        image, text = ours.encode_image(images, True), ours.encode_text(tokens, True)
        found = ours.probabilities(image @ text.T)
        torch.testing.assert_close(found, logits.sigmoid(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(images, tokens)[0], logits, atol=1e-4, rtol=1e-5)
    ours.logit_scale.data.fill_(5.0)
    ours.clamp_logit_scale()
    assert ours.logit_scale.item() == 5.0  # published SigLIPs are above log(100)


DISTANCES = {  # of some parameters from the features: blocks, or stages of unequal ones
    siglip: {"visual.trunk.pos_embed": 7, "visual.trunk.blocks.0.norm1.weight": 6,
             "visual.trunk.blocks.5.norm1.weight": 1, "visual.trunk.norm.weight": 0,
             "visual.trunk.attn_pool.q.weight": 0, "text.token_embedding.weight": 3,
             "text.transformer.resblocks.0.ln_1.bias": 2, "text.text_projection.weight": 0,
             "text.ln_final.weight": 0, "logit_bias": 0},
    convnext: {"visual.trunk.stem.0.weight": 5, "visual.trunk.stages.0.blocks.0.norm.weight": 4,
               "visual.trunk.stages.3.blocks.0.norm.weight": 1, "visual.trunk.head.norm.weight": 0,
               "visual.head.proj.weight": 0},
    efficientnet_bert: {"visual.trunk.bn2.weight": 0, "visual.trunk.conv_head.weight": 0,
                        "text.transformer.embeddings.word_embeddings.weight": 3,
                        "text.transformer.encoder.layer.0.output.dense.bias": 2,
                        "text.transformer.encoder.layer.1.output.dense.bias": 1,
                        "text.proj.2.weight": 0},
}  # fmt: skip


@pytest.mark.parametrize("make", DISTANCES)
def test_blocks_of_all_kinds_of_towers_are_counted_from_the_end(tmp_path, make):
    make(tmp_path / "model")
    distances = distance_from_end(load(tmp_path / "model", "cpu")[0])
    assert {name: distances[name] for name in DISTANCES[make]} == DISTANCES[make]


@pytest.mark.parametrize("lock", [("image",), ("text",), ("image", "text")])
def test_of_frozen_towers_of_other_libraries_the_last_projections_learn(tmp_path, lock):
    """As open_clip's own locks leave them."""
    theirs = efficientnet_bert(tmp_path / "model")
    ours, _ = load(tmp_path / "model", "cpu")
    for tower in lock:
        freeze(ours, tower, 0)
        getattr(theirs, f"lock_{tower}_tower")()
    learns = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.requires_grad} == learns
    assert frozen_towers(ours) == list(lock)
    assert {"visual.head.proj.weight", "text.proj.0.weight"} <= learns


def test_the_width_of_an_image_tower_is_that_of_its_last_stage(tmp_path):
    """As of a ResNet, whose rate is known, and not that of a convolution that widens it."""
    efficientnet_bert(tmp_path / "model")
    model, _ = load(tmp_path / "model", "cpu")
    head = model.visual.trunk.conv_head
    assert model.config.last_width == head.in_channels < head.out_channels


def test_without_open_clip_a_line_says_what_to_install(tmp_path, monkeypatch):
    siglip(tmp_path / "model")
    monkeypatch.setattr(open_clip_model, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="which the library open_clip has: pip install open_clip"):
        load(tmp_path / "model")


def test_batch_norms_of_timm_are_refused_in_several_processes(tmp_path):
    efficientnet_bert(tmp_path / "model")
    model, _ = load(tmp_path / "model", "cpu")
    with pytest.raises(InputError, match="in one process alone"):
        whole_batch_norms(model, torch.device("cuda"), Processes(0, 2), None)


def test_a_missing_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    siglip(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    model, _ = load(tmp_path / "model", "cpu")
    with pytest.raises(InputError, match=r"its tokenizer cannot be read .* of nobody/t5 into"):
        model.tokenize("a star")


def test_another_resolution_is_refused(tmp_path):
    siglip(tmp_path / "model")
    with pytest.raises(InputError, match="takes images of 160 pixels, not of 64"):
        load(tmp_path / "model", "cpu", input_shape=64)


# Small versions of all descriptions.

TRUNKS = {  # arguments of timm's kinds of models, by the start of their names
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "swin": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64)},
    "vit_base_mci": {"depth": 2},
    "": {"depth": 2, "embed_dim": 64, "num_heads": 2},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 256,
         "num_attention_heads": 2, "max_position_embeddings": 90}  # fmt: skip
M2M = {"vocab_size": 256, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1,
       "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2,
       "decoder_attention_heads": 2}  # fmt: skip
MT5 = {"vocab_size": 256, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
TEXT_TOWERS = {
    "roberta-base": RobertaConfig(**SMALL),
    "xlm-roberta": XLMRobertaConfig(**SMALL),
    "facebook/nllb": M2M100Config(**M2M),
    "google/mt5": MT5Config(**MT5),
}


LEARNING = {  # of the families that no pair above has
    "EVA02-B-16", "MobileCLIP-S1", "MobileCLIP2-S3", "PE-Core-B-16", "ViTamin-B",
    "ViT-B-16-SigLIP2", "swin_base_patch4_window7_224", "mt5-base-ViT-B-32", "nllb-clip-base",
    "xlm-roberta-base-ViT-B-32", "roberta-ViT-B-32",
}  # fmt: skip


def small_stages(create=vitamin.VitCfg, **settings):
    """The description of ViTamin's stages before its blocks, with one layer each."""
    return create(**settings | {"embed_dim": (8, 16, 64), "depths": (1, 1, 1), "stem_width": 8})


def small_trunk(name, create=timm.create_model, **settings):
    """timm's model with two blocks, or with one in each stage."""
    kind = next(start for start in TRUNKS if name.startswith(start))
    return create(name, **TRUNKS[kind] | settings)


def small(description, folder):
    """The description with two layers and few channels in open_clip's own towers."""
    description = copy.deepcopy(description)
    vision, text = description["vision_cfg"], description["text_cfg"]
    if "timm_model_name" not in vision:
        vision |= {"layers": 2, "width": 64, "head_width": 32}
    if "timm_proj" not in vision or vision["timm_proj"] != "linear":
        description["embed_dim"] = 64
    if "hf_model_name" in text:
        kind = next(kind for kind in TEXT_TOWERS if text["hf_model_name"].startswith(kind))
        TEXT_TOWERS[kind].save_pretrained(folder)
        text["hf_model_name"] = str(folder)
        return description, wordpiece(TEXT_TOWERS[kind].pad_token_id)
    text |= {"width": 64, "heads": 2, "layers": 2}
    if "hf_tokenizer_name" not in text:
        return description, None
    text["vocab_size"] = 256
    return description, unigram() if "SigLIP" in text["hf_tokenizer_name"] else wordpiece()


@pytest.mark.slow
def test_all_of_open_clips_models_are_ours_or_built_by_open_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_model.timm, "create_model", small_trunk)
    monkeypatch.setattr(vitamin, "VitCfg", small_stages)
    ways = {"ours": set(), "open_clip": set(), "refused": set()}
    for name in open_clip.list_models():
        try:
            config = any_description(copy.deepcopy(DESCRIPTIONS[name]), tmp_path)
        except InputError as refused:
            assert "a CoCa, which also writes captions" in str(refused)
            ways["refused"].add(name)
            continue
        if not isinstance(config, OpenClipConfig):
            ways["ours"].add(name)
            continue
        description, tokenizer = small(DESCRIPTIONS[name], tmp_path / "text")
        theirs = save_random(tmp_path / name, description, tokenizer)
        ours, _ = load(tmp_path / name, "cpu")
        assert_same_features(theirs, ours)
        if name in LEARNING:
            assert_same_gradients(theirs, ours)
        ways["open_clip"].add(name)
    assert ways["open_clip"] >= LEARNING
    assert ways["ours"] == set(OWN)
    assert ways["refused"] == {name for name in DESCRIPTIONS if name.startswith("coca_")}
    assert {way: len(names) for way, names in ways.items()} == {
        "ours": 41, "open_clip": 99, "refused": 4,
    }  # fmt: skip
