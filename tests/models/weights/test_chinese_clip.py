"""Chinese-CLIP models in the formats of transformers and of cn_clip, in and out."""

import inspect
import json
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peers import chinese_clip_model, cn_clip_model
from PIL import Image
from safetensors.torch import save_file
from script_runs import ROOT, error_line, run_script
from transformers import BertTokenizer, ChineseCLIPModel, ChineseCLIPProcessor

from models import CLIP, load
from models.config import Config
from models.convert import convert
from models.errors import InputError
from models.preprocess import open_image
from models.weights.architecture import infer_config
from models.weights.formats import FORMATS
from models.weights.registry import CONFIGS
from models.weights.transformers import (
    config_to_transformers,
    from_transformers,
    to_ours,
    to_transformers,
)
from models.wordpiece import VOCABULARY_FILE
from utils.runs.checkpoint import save_weights

CAPTIONS = ["一只红色的鸟停在篱笆上", "两只狗", "It's 10 o'clock, 大家好!"]
SMALL = replace(CONFIGS["cn-demo"], vision_layers=1, transformer_layers=1, text_positions=512)
# As wide as cn_clip's ViT-B/32, by which files of its authors are known, but for the text tower.
AUTHORS = replace(
    SMALL, vision_layers=12, vision_width=768, vision_mlp_width=3072, vision_patch_size=32
)
RESNET = replace(
    SMALL, vision_layers=(1, 1, 1, 1), vision_width=64, vision_patch_size=None,
    vision_mlp_width=None, embed_dim=1024, image_resolution=64,
)  # fmt: skip


def random_model(config, seed=0):
    torch.manual_seed(seed)
    return CLIP(config).initialize().eval()


@pytest.fixture
def theirs():
    return chinese_clip_model(replace(SMALL, activation="gelu"))


@pytest.fixture
def folder(theirs, tmp_path):
    """As transformers saves a model, and with the authors' preprocessing: both sides resized."""
    theirs.save_pretrained(tmp_path / "model")
    BertTokenizer(vocab=str(VOCABULARY_FILE)).save_pretrained(tmp_path / "model")
    preprocessor = {"image_processor_type": "ChineseCLIPImageProcessor", "do_center_crop": False,
                    "size": {"height": 64, "width": 64}, "resample": 3}  # fmt: skip
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return tmp_path / "model"


def assert_same_features(ours, path):
    """transformers' model and processor in a folder give what our model gives."""
    model, processor = (c.from_pretrained(path) for c in (ChineseCLIPModel, ChineseCLIPProcessor))
    with Image.open(ROOT / "R_mAP.png") as image, torch.no_grad():
        given = processor(
            text=CAPTIONS, images=image.convert("RGB"), return_tensors="pt", padding=True
        )
        output = model.eval()(**given)
        pixels = ours.preprocess(open_image(ROOT / "R_mAP.png"))[None]
        # Its processor resizes tensors, whose rounding is another.
        torch.testing.assert_close(given["pixel_values"], pixels, atol=0.05, rtol=0)
        logits, _ = ours(given["pixel_values"], ours.tokenize(CAPTIONS))
        torch.testing.assert_close(logits, output.logits_per_image, atol=1e-4, rtol=1e-4)


def test_a_folder_of_transformers_is_read_with_its_description(folder, theirs):
    ours, preprocess = load(folder, "cpu")
    assert ours.config == replace(SMALL, activation="gelu")
    assert (preprocess.resize_mode, ours.context_length) == ("squash", 52)
    assert_same_features(ours, folder)
    again = to_transformers(ours.state_dict())
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    # Without the preprocessor's file: what the authors do.
    (folder / "preprocessor_config.json").unlink()
    assert load(folder, "cpu")[0].config == ours.config


@pytest.mark.parametrize(
    ("tower", "field", "value", "message"),
    [
        (
            "text_config",
            "hidden_act",
            "gelu_new",
            "text_config has hidden_act 'gelu_new'; only gelu",
        ),
        ("text_config", "layer_norm_eps", 1e-5, "layer_norm_eps 1e-05; only 1e-12 works"),
        ("text_config", "type_vocab_size", 4, "type_vocab_size 4; only 2 works"),
        (
            "text_config",
            "vocab_size",
            12000,
            "its tokenizer has 12,000 tokens, not the 21,128 of the BertTokenizer here",
        ),
        ("text_config", "num_attention_heads", 3, "transformer_width 128 is no multiple"),
        ("vision_config", "hidden_act", "silu", "its activation would be 'silu'"),
    ],
)
def test_what_no_model_here_has_is_named(folder, tower, field, value, message):
    content = json.loads((folder / "config.json").read_text())
    content[tower][field] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder}: ")


def test_the_description_survives_a_round_trip():
    config = replace(SMALL, activation="gelu", context_length=77, resize_mode="shortest")
    assert from_transformers(*config_to_transformers(config)) == config


@pytest.fixture(scope="module")
def run_weights(tmp_path_factory):
    """(file, model): weights as a run writes them, with a description beside them."""
    file = tmp_path_factory.mktemp("run") / "best_epoch_weights.pth"
    model = random_model(replace(SMALL, context_length=60, activation="gelu"))
    save_weights(model, file)
    return file, load(file, "cpu")[0]


def test_weights_of_a_run_come_back_as_they_were(run_weights, tmp_path):
    file, model = run_weights
    assert model.config == replace(SMALL, context_length=60, activation="gelu")
    save_weights(model, tmp_path / file.name)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_transformers_opens_converted_weights_and_we_do_again(run_weights, tmp_path):
    file, model = run_weights
    done = run_script("models/convert.py", file, "out", "--format", "transformers", cwd=tmp_path)
    assert 'ChineseCLIPModel.from_pretrained("out")' in done.stdout
    assert "    CLIPModel" not in done.stdout
    assert_same_features(model, tmp_path / "out")
    assert ChineseCLIPProcessor.from_pretrained(tmp_path / "out").tokenizer.model_max_length == 60
    back, _ = load(tmp_path / "out", "cpu")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[k], t) for k, t in model.state_dict().items())
    line = error_line("models/convert.py", file, "more", "--format", "open_clip", cwd=tmp_path)
    assert "open_clip has no Chinese-CLIP; take --format transformers or cn_clip" in line


@pytest.mark.parametrize("config", [AUTHORS, RESNET])
def test_a_file_of_cn_clip_is_read_with_its_activation_and_without_its_pooler(config, tmp_path):
    model = random_model(config)
    theirs = cn_clip_model(config, model.state_dict())
    weights = {f"module.{key}": tensor.half() for key, tensor in theirs.state_dict().items()}
    weights["module.bert.pooler.dense.weight"] = torch.zeros(128, 128)
    weights["module.bert.pooler.dense.bias"] = torch.zeros(128)
    content = {"epoch": 1, "step": 7, "name": "pretrained", "state_dict": weights}
    torch.save(content, tmp_path / "clip_cn_model.pt")
    ours, _ = load(tmp_path / "clip_cn_model.pt", "cpu")
    assert ours.config == config
    assert load(tmp_path, "cpu")[0].config == config  # as a hub has it
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    tokens = ours.tokenize(CAPTIONS)
    with torch.no_grad():
        for mine, other in [
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens.long())),
        ]:
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_their_weights_alone_have_the_authors_activation_unless_another_is_given(tmp_path):
    """In the keys of transformers as in those of cn_clip, without a description beside them."""
    weights = random_model(AUTHORS).state_dict()
    save_file(to_transformers(weights), tmp_path / "model.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "own.pt")
    for file in ("model.safetensors", "own.pt"):
        assert load(tmp_path / file, "cpu")[0].config.activation == "quick_gelu"
        assert load(tmp_path / file, "cpu", activation="gelu")[0].config.activation == "gelu"


def test_the_authors_models_are_inferred_from_their_shapes():
    """By those that cn_clip has for its names; a model of ours with the same sizes has its keys."""
    clip = pytest.importorskip("cn_clip.clip", reason="needs cn_clip")
    folder = Path(clip.__file__).with_name("model_configs")
    names = clip.utils._MODEL_INFO
    assert len(names) == 5
    for info in names.values():
        vision, text = (
            json.loads((folder / f"{part}.json").read_text()) for part in info["struct"].split("@")
        )
        is_vit, width = vision["vision_patch_size"] is not None, text["text_hidden_size"]
        expected = Config(
            embed_dim=vision["embed_dim"],
            image_resolution=info["input_resolution"],
            vision_layers=vision["vision_layers"] if is_vit else (3, 4, 6, 3),
            vision_width=vision["vision_width"],
            vision_patch_size=vision["vision_patch_size"],
            vision_mlp_width=4 * vision["vision_width"] if is_vit else None,
            vision_head_width=vision.get("vision_head_width", 64),
            transformer_width=width,
            transformer_mlp_width=text["text_intermediate_size"],
            transformer_heads=text["text_num_attention_heads"],
            transformer_layers=text["text_num_hidden_layers"],
            context_length=inspect.signature(clip.tokenize).parameters["context_length"].default,
            vocab_size=text["vocab_size"],
            text_tower="bert",
            text_positions=text["text_max_position_embeddings"],
            resize_mode="squash",
        )
        with torch.device("meta"):
            weights = CLIP(expected).state_dict()
        assert infer_config(weights) == expected


def test_cn_clip_opens_converted_weights(tmp_path, monkeypatch):
    utils = pytest.importorskip("cn_clip.clip.utils", reason="needs cn_clip")
    model = random_model(SMALL)
    save_weights(model, tmp_path / "weights.pth")  # rounds them to float16, as cn_clip does
    model, _ = load(tmp_path / "weights.pth", "cpu")
    words = ["models/convert.py", "weights.pth", "clip_cn.pt", "--format", "cn_clip"]
    assert "load_from_name" in run_script(*words, cwd=tmp_path).stdout
    (tmp_path / "model_configs").mkdir()
    vision = {"embed_dim": 256, "image_resolution": 64, "vision_layers": 1, "vision_width": 192,
              "vision_patch_size": 16}  # fmt: skip
    text = {"vocab_size": 21128, "text_attention_probs_dropout_prob": 0.1, "text_hidden_size": 128,
            "text_hidden_dropout_prob": 0.1, "text_hidden_act": "gelu",
            "text_initializer_range": 0.02, "text_intermediate_size": 512,
            "text_max_position_embeddings": 512, "text_num_attention_heads": 2,
            "text_num_hidden_layers": 1, "text_type_vocab_size": 2}  # fmt: skip
    for name, content in (("small-vit", vision), ("small-bert", text)):
        (tmp_path / "model_configs" / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    theirs, preprocess = utils.load_from_name(
        str(tmp_path / "clip_cn.pt"), device="cpu", vision_model_name="small-vit",
        text_model_name="small-bert", input_resolution=64,
    )  # fmt: skip
    with Image.open(ROOT / "R_mAP.png") as image, torch.no_grad():
        pixels = preprocess(image.convert("RGB"))
        assert torch.equal(pixels, model.preprocess(open_image(ROOT / "R_mAP.png")))
        logits, _ = theirs.eval().get_similarity(pixels[None], utils.tokenize(CAPTIONS))
        ours, _ = model(pixels[None], model.tokenize(CAPTIONS))
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_onnx_answers_as_the_printed_code_says(run_weights, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    _, model = run_weights
    folder, texts = tmp_path / "onnx", [*CAPTIONS, "狗" * 70]
    convert(model, folder, "onnx")
    side = model.config.image_resolution
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = model(images, model.tokenize(texts, truncate=True))
    for given in (texts, CAPTIONS):  # shorter rows
        found = {"images": images.numpy(), "texts": given}
        code = textwrap.dedent(FORMATS["onnx"].opened_by)
        exec(code.format(folder.as_posix(), tokenizer="BertTokenizer"), found)
        logits = torch.from_numpy(found["logits"]).float()
        torch.testing.assert_close(logits, expected[:, : len(given)], atol=1e-3, rtol=1e-4)


def test_weights_without_a_description_may_have_another_activation(tmp_path):
    model = random_model(SMALL)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    ours, _ = load(tmp_path / "weights.safetensors", "cpu", activation="gelu")
    assert ours.config == replace(SMALL, activation="gelu")
    assert all(torch.equal(ours.state_dict()[k], t) for k, t in model.state_dict().items())
    theirs = to_transformers(model.state_dict())
    back = to_ours(theirs)
    assert all(torch.equal(back[key], t) for key, t in model.state_dict().items())


def test_half_a_model_and_two_models_are_refused(tmp_path):
    weights = random_model(SMALL).state_dict()
    text = {key: t for key, t in weights.items() if not key.startswith("visual.")}
    save_file(text, tmp_path / "text.safetensors")
    with pytest.raises(InputError, match="not the weights of a whole CLIP"):
        load(tmp_path / "text.safetensors")
    torch.save({"one": weights, "two": weights | {}}, tmp_path / "two.pt")
    with pytest.raises(InputError, match="holds 2 CLIP models"):
        load(tmp_path / "two.pt")
