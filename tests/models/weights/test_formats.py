"""A row for each format and family of CLIP: read here, it gives the features that the library it
comes from computes, and so it does in that library once it was converted."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
from peers import (
    MEAN,
    STD,
    save_open_clip,
    save_transformers,
    small_open_clip,
    small_transformers,
    their_features,
)
from PIL import Image
from published import save_published
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPImageProcessor, CLIPModel

from models import CLIP, build_model, load, tokenize
from models.convert import convert
from models.preprocess import Preprocess
from models.weights.open_clip import from_open_clip
from utils.machine.precision import Precision
from utils.runs.checkpoint import save_checkpoint, save_weights
from utils.training.state import State

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CAPTIONS = ["a red bird on a fence", "两只狗", "one " * 30, "word " * 120 + "end"]


# --- Rows: each writes its format into a folder; returns the path, arguments of `load`, the model -


def open_clip_folder(folder, weights="safetensors", **family):
    """As open_clip saves it for a hub, which writes both files."""
    model, description = small_open_clip(**family)
    save_open_clip(model, description, folder)
    for file in folder.glob("open_clip_*model.*"):
        if file.suffix != f".{weights}":
            file.unlink()
    return folder, {}, model


def bare(folder):
    model, _ = small_open_clip()
    torch.save(model.state_dict(), folder / "bare.pt")
    return folder / "bare.pt", {"activation": "gelu"}, model


def custom_text(folder):
    """As open_clip saves a model whose text tower is a module of its own, with a mask as buffer."""
    plain, description = small_open_clip()
    model = open_clip.model.CustomTextCLIP(**description)
    model.load_state_dict(
        open_clip.model.convert_to_custom_text_state_dict(plain.state_dict()), strict=False
    )
    file = folder / "open_clip_pytorch_model.bin"
    torch.save(model.state_dict() | {"text.attn_mask": torch.zeros(77, 77)}, file)
    description |= {"custom_text": True}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return file, {}, model


def training_checkpoint(folder):
    """As open_clip's training saves it on several GPUs, with the description laid beside it."""
    model, description = small_open_clip(width=160, head_width=80)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.encode_text(tokenize(CAPTIONS, truncate=True)).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "name": "run", "optimizer": optimizer.state_dict(),
               "state_dict": torch.nn.DataParallel(model).state_dict()}  # fmt: skip
    torch.save(content, folder / "epoch_3.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder / "epoch_3.pt", {}, model


def moving_average(folder):
    model, description = small_open_clip()
    content = {"epoch": 3, "state_dict_ema": AveragedModel(model).state_dict()}
    torch.save(content, folder / "epoch_3.pt")
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder / "epoch_3.pt", {}, model


def long_clip(folder):
    """Long-CLIP's own files: a position's embedding is that of `positional_embedding` for the first
    20, and of `positional_embedding_res` for the others."""
    model, _ = small_open_clip(quick_gelu=True, context=248)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    weights["positional_embedding_res"] = weights["positional_embedding"].clone()
    weights["positional_embedding_res"][:20] = 7
    weights["positional_embedding"][20:] = 7
    torch.save(weights, folder / "longclip.pt")
    return folder / "longclip.pt", {"activation": "quick_gelu"}, model


def archive(folder, **family):
    """In float16, as OpenAI published it."""
    model, _ = small_open_clip(quick_gelu=True, **family)
    path = save_published(model.state_dict(), folder / "archive.pt")
    return path, {}, open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()


def transformers_folder(folder, shards="5GB", processor=True, **family):
    model = small_transformers(**family)
    save_transformers(model, folder, processor, max_shard_size=shards)
    assert len(list(folder.glob("*.safetensors"))) == {"5GB": 1, "5MB": 2}[shards]
    return folder, {}, model


def transformers_bin(folder):
    """As versions before safetensors wrote it, with descriptions of the towers that count more."""
    folder, _, model = transformers_folder(folder, activation="gelu", processor=False)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    content = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        content |= {tower: {"hidden_act": "quick_gelu"}, f"{tower}_dict": content[tower]}
    (folder / "config.json").write_text(json.dumps(content))
    return folder, {}, model


def own_weights(folder):
    model, description = small_open_clip(width=160, head_width=80)
    ours = build_model(model.state_dict(), from_open_clip(description))
    save_weights(ours, folder / "best_epoch_weights.pth")
    return folder / "best_epoch_weights.pth", {}, open_clip.create_model(f"local-dir:{folder}")


def own_checkpoint(folder):
    """Alone: the description is in it."""
    model, description = small_open_clip(width=160, head_width=80)
    ours = build_model(model.state_dict(), from_open_clip(description))
    optimizer = torch.optim.AdamW(ours.parameters())
    state = State(ours, optimizer, Precision(torch.device("cpu"), use_amp=False), ema=0.9)
    torch.nn.init.zeros_(state.scored.text_projection)  # of the average, which is not the model
    save_checkpoint(folder / "checkpoint.pth", arguments={}, **state.state_dict())
    return folder / "checkpoint.pth", {}, model


RESNET = {"layers": [1, 1, 1, 1], "width": 16}
ROWS = {
    "archive": archive,
    "archive of a ResNet": partial(archive, **RESNET),
    "open_clip": open_clip_folder,
    "open_clip, .bin": partial(open_clip_folder, weights="bin"),
    "open_clip, QuickGELU": partial(open_clip_folder, quick_gelu=True),
    "open_clip, QuickGELU, .bin": partial(open_clip_folder, quick_gelu=True, weights="bin"),
    "open_clip, heads of 80": partial(open_clip_folder, width=160, head_width=80),
    "open_clip, heads of 88": partial(open_clip_folder, width=176, head_width=88),
    "open_clip, heads of 104": partial(open_clip_folder, width=208, head_width=104),
    "open_clip, ResNet": partial(open_clip_folder, **RESNET),
    "open_clip, 248 tokens": partial(open_clip_folder, context=248),
    "open_clip, 42 tokens": partial(open_clip_folder, context=42),
    "open_clip, custom text": custom_text,
    "open_clip, training": training_checkpoint,
    "moving average": moving_average,
    "state dict": bare,
    "Long-CLIP": long_clip,
    "transformers": transformers_folder,
    "transformers, end 2": partial(transformers_folder, eos=2, processor=False),
    "transformers, GELU": partial(transformers_folder, activation="gelu"),
    "transformers, heads of 80": partial(transformers_folder, width=160),
    "transformers, sharded": partial(transformers_folder, shards="5MB"),
    "transformers, .bin": transformers_bin,
    "ours": own_weights,
    "ours, checkpoint": own_checkpoint,
}


def assert_close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_every_format_gives_the_features_of_its_library_in_and_out(row, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path, arguments, theirs = ROWS[row](folder)
    ours, preprocess = load(path, "cpu", **arguments)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(CAPTIONS, ours.context_length, truncate=True)
    expected = their_features(theirs.eval(), images, tokens)
    assert_close(their_features(ours, images, tokens), expected)
    modes = {"open_clip": "squash", "transformers": "shortest"}
    if (library := row.partition(",")[0]) in modes and path.is_dir():
        assert preprocess == Preprocess(64, MEAN, STD, "bilinear", modes[library])

    activations = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
    other = replace(ours.config, activation=activations[ours.config.activation])
    wrong = their_features(build_model(ours.state_dict(), other), images, tokens)
    for part, would_be in list(zip(expected, wrong, strict=True))[0 if ours.config.is_vit else 1 :]:
        assert (part - would_be).abs().max() > 1e-2

    convert(ours, tmp_path / "open_clip", "open_clip")
    opened = {"open_clip": open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()}
    if ours.config.is_vit:
        convert(ours, tmp_path / "transformers", "transformers")
        opened["transformers"] = CLIPModel.from_pretrained(tmp_path / "transformers").eval()
    for name, model in opened.items():
        assert_close(their_features(model, images, tokens), expected)
        back, _ = load(tmp_path / name, "cpu")
        assert isinstance(back, CLIP) and back.config == ours.config
        assert all(torch.equal(back.state_dict()[k], t) for k, t in ours.state_dict().items())


def test_what_a_description_of_transformers_leaves_out_is_its_default(tmp_path):
    """QuickGELU and bicubic, as the library itself reads these files."""
    transformers_folder(tmp_path, processor=False)
    for name in ("config.json", "preprocessor_config.json"):
        content = json.loads((tmp_path / name).read_text())
        for part in (content, content.get("text_config", {}), content.get("vision_config", {})):
            part.pop("hidden_act", None)
            part.pop("resample", None)
        (tmp_path / name).write_text(json.dumps(content))
    ours, preprocess = load(tmp_path, "cpu")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = tokenize(CAPTIONS, truncate=True)
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    assert_close(*(their_features(model, images, tokens) for model in (ours, theirs)))
    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image, processor = Image.fromarray(noise), CLIPImageProcessor.from_pretrained(tmp_path)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (preprocess(image) - expected).abs().mean() < 0.02  # rounding; bilinear: 0.2


def test_more_than_77_tokens_are_read_where_the_model_reads_more(tmp_path):
    path, _, _ = open_clip_folder(tmp_path, context=248)
    model, _ = load(path, "cpu")
    texts = [f"{'word ' * 110}{end}" for end in ("a red bird", "two boats")]
    with torch.no_grad():
        first, second = model.encode_text(tokenize(texts, model.context_length))
        assert (first - second).abs().max() > 1e-2
        first, second = model.encode_text(tokenize(texts, 77, truncate=True))
        assert torch.equal(first, second)
