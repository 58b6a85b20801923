"""Folders and files that hold no CLIP to be read: refused in one line, which names the file and
what to do; and the ways in which weights are wrapped."""

import json
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from script_runs import error_line

from models import CLIP, load
from models.clip_utils import create_model, find_weights
from models.config import Config
from models.convert import convert
from models.errors import InputError
from models.weights.read import unwrap
from utils.runs.checkpoint import save_weights

OPEN_CLIP, TRANSFORMERS = "open_clip_config.json", "config.json"
WEIGHTS = {"open_clip": "open_clip_model.safetensors", "transformers": "model.safetensors"}
CONFIG = Config(
    embed_dim=48, image_resolution=64, vision_layers=2, vision_width=128, vision_patch_size=16,
    vision_mlp_width=512, transformer_width=64, transformer_mlp_width=256,
    transformer_heads=1, transformer_layers=2, activation="gelu",
)  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a right folder of each format."""
    path = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = CLIP(CONFIG).initialize().eval()
    for name in WEIGHTS:
        convert(model, path / name, name)
        load(path / name, "cpu")
    return path


# --- What is changed in a folder: `file` is a name in it, or its only weights ---------------------


def weights_in(folder: Path) -> Path:
    return next(file for name in WEIGHTS.values() if (file := folder / name).exists())


def put(folder: Path, field: str, value: object, file: str = OPEN_CLIP) -> None:
    """Give a field of a JSON file, such as `model_cfg.embed_dim`, another value."""
    content = json.loads((folder / file).read_text())
    *parents, last = field.split(".")
    part = content
    for parent in parents:
        part = part[parent]
    part[last] = value
    (folder / file).write_text(json.dumps(content))


def text(folder: Path, content: str, file: str) -> None:
    (folder / file).write_text(content)


def content(folder: Path, data: bytes) -> None:
    weights_in(folder).write_bytes(data)


def weights(folder: Path, change) -> None:
    file = weights_in(folder)
    save_file(change(load_file(file)), file)


def another_model(folder: Path, model_type: str, tower: str = "") -> None:
    """With the model type, and of the weights those with `tower` in their names."""
    put(folder, "model_type", model_type, TRANSFORMERS)
    weights(folder, lambda w: {k: t for k, t in w.items() if tower in k})


def sharded(folder: Path, part: str) -> None:
    """An index that lists `part` as the place of the weights."""
    names = load_file(weights_in(folder))
    weights_in(folder).rename(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, part)}
    text(folder, json.dumps(index), "model.safetensors.index.json")


def two_clips(folder: Path) -> None:
    found = load_file(weights_in(folder))
    weights_in(folder).unlink()
    pair = {"state_dict": {f"module.{k}": t for k, t in found.items()}, "ema": found}
    torch.save(pair, folder / "open_clip_pytorch_model.bin")


def zipped(folder: Path) -> None:
    with zipfile.ZipFile(weights_in(folder), "w") as file:
        file.writestr("pytorch_model.bin", b"0" * 100)


def of_a_shape(found: dict, shape: tuple[int, ...]) -> dict:
    return found | {"text_projection": torch.zeros(shape)}


def with_nan(found: dict) -> dict:
    found["visual.proj"][1, 2] = torch.nan
    return found


def other_towers(folder: Path, **preprocessing: object) -> None:
    """A description for open_clip, with this preprocessing."""
    put(folder, f"{VISION}.no_ln_pre", True)
    put(folder, "preprocess_cfg", preprocessing)


VISION, TEXT = "model_cfg.vision_cfg", "model_cfg.text_cfg"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n"
# The format of the folder that is changed, how, and what is said: the file, what is wrong with it,
# and what to do.
WRONG = {
    # Folders
    "nothing in it": (
        "open_clip", lambda f: [file.unlink() for file in f.iterdir()],
        "a folder without weights; give a file, or add one of open_clip_model.safetensors",
    ),
    "a config only": ("transformers", lambda f: weights_in(f).unlink(), "a folder without weights"),
    "missing shard": (
        "transformers", partial(sharded, part="part-00002-of-00002.safetensors"),
        r"part-00002-of-00002\.safetensors: .*No such file .*; download",
    ),
    # Descriptions
    "broken JSON": ("open_clip", partial(text, content="{", file=OPEN_CLIP),
                    r"open_clip_config\.json: broken JSON .*; download"),
    "JSON that is a list": ("transformers", partial(text, content="[1]", file=TRANSFORMERS),
                            r"/copy: config\.json: should hold a description.*; download"),
    "JSON nested deep": ("transformers", partial(text, content="[" * 99999, file=TRANSFORMERS),
                         "config.json: broken JSON"),
    "sizes of another model": ("open_clip", partial(put, field=f"{TEXT}.layers", value=3),
                               r"missing: transformer\.resblocks\.2.*download"),
    "sizes of another model, transformers": (
        "transformers",
        partial(put, field="vision_config.hidden_size", value=768, file=TRANSFORMERS),
        "another shape or type: visual.*download",
    ),
    "another MLP": ("open_clip", partial(put, field=f"{VISION}.mlp_ratio", value=2),
                    "another shape or type"),
    "no text tower": ("open_clip", partial(put, field="model_cfg.text_cfg", value=None),
                      r"config\.json: its description is not that of a CLIP"),
    "a wrong mean": ("open_clip", partial(put, field="preprocess_cfg.mean", value=[0.5]),
                     r"open_clip_config\.json: its mean would be \(0\.5,\)"),
    "an unknown resize": (
        "open_clip", partial(put, field="preprocess_cfg.resize_mode", value="longest"),
        "its resize_mode would be 'longest'",
    ),
    "heads that do not fit": ("open_clip", partial(put, field=f"{TEXT}.heads", value=3),
                              "its transformer_width 64 is no multiple of its 3 attention heads"),
    **{
        f"{field} of {value}": ("open_clip", partial(put, field=field, value=value),
                                rf"open_clip_config\.json: its {said}")
        for field, value, said in [
            (f"{VISION}.width", "128", "description is not that of a CLIP .*multiply"),
            (f"{VISION}.width", 0, "vision_width would be 0"),
            (f"{VISION}.head_width", 0, "description .*zero|head_width would be 0"),
            (f"{VISION}.mlp_ratio", float("nan"), "description .*NaN"),
            (f"{VISION}.image_size", [64, 32], r"images? of \[64, 32\] pixels|takes images"),
            (f"{TEXT}.layers", -1, "transformer_layers would be -1"),
            ("model_cfg.embed_dim", "48", "embed_dim would be '48'"),
            ("model_cfg.embed_dim", 48.0, "embed_dim would be 48.0"),
        ]
    },
    **{
        f"{field} of {value}": (
            "transformers", partial(put, field=field, value=value, file=TRANSFORMERS),
            rf"/copy: config\.json: its {said}",
        )
        for field, value, said in [
            ("text_config.hidden_size", "64", "transformer_width would be '64'"),
            ("text_config.vocab_size", -1, "vocab_size would be -1"),
            ("vision_config.num_attention_heads", 0, "description is not .*zero"),
            ("vision_config.image_size", float("nan"), "image_resolution would be nan"),
            ("vision_config.num_hidden_layers", 0, "vision_layers would be 0"),
            ("projection_dim", None, "embed_dim would be None"),
            ("text_config.eos_token_id", 7, "text_config has eos_token_id 7; only 49407 or 2"),
            ("text_config.hidden_act", "relu", "towers differ in hidden_act; only one"),
            ("vision_config.hidden_act", "relu", "towers differ in hidden_act; only one"),
            ("vision_config.layer_norm_eps", 1e-6, "vision_config has layer_norm_eps 1e-06; only"),
        ]
    },
    "cut out smaller": (
        "transformers",
        partial(put, field="size", value={"shortest_edge": 72}, file="preprocessor_config.json"),
        r"preprocessor_config\.json: it resizes images to {'shortest_edge': 72} and cuts out",
    ),
    # Other models
    "SigLIP": ("transformers", partial(another_model, model_type="siglip"),
               r"config\.json: its model_type is 'siglip', .* such as ViT-B-16-SigLIP/webli"),
    "BLIP": ("transformers", partial(another_model, model_type="blip"), "model_type is 'blip'"),
    "a vision tower": (
        "transformers", partial(another_model, model_type="clip_vision_model", tower="vision"),
        "model_type is 'clip_vision_model', not clip or chinese_clip; take a whole CLIPModel",
    ),
    "a text tower": (
        "transformers", partial(another_model, model_type="clip_text_model", tower="text_"),
        "model_type is 'clip_text_model'",
    ),
    "an unknown timm tower": (
        "open_clip", partial(put, field=f"{VISION}.timm_model_name", value="vit_of_nobody"),
        r"open_clip cannot build it \(Unknown model \(vit_of_nobody\)\); take another model",
    ),
    "an unknown field": (
        "open_clip", partial(put, field=f"{VISION}.towers", value=3),
        r"open_clip cannot build it \(.*unexpected keyword argument 'towers'\); take another",
    ),
    "padding around images": (
        "open_clip", partial(other_towers, resize_mode="longest"),
        "its resize_mode is 'longest'; shortest and squash work; take another model",
    ),
    "a CoCa": ("open_clip", partial(put, field="model_cfg.multimodal_cfg", value={"layers": 2}),
               r"open_clip_config\.json: .*: a CoCa, which also writes captions; take another"),
    # Weights
    "two CLIPs": ("open_clip", two_clips,
                  r"model\.bin: holds 2 CLIP models \(ema, state_dict\.module\); save the one"),
    "ONNX": ("open_clip", partial(content, data=b"\x08\x0a\x12\x07pytorch\x1a\x052.9.0:\xff"),
             r"model\.safetensors: another file of 20 bytes, not weights; download it .*\.pt"),
    "a zip": ("open_clip", zipped, "an archive without .*data.pkl, so not torch's; .*unpack it"),
    "Git LFS": ("transformers", partial(content, data=POINTER),
                r"model\.safetensors: a Git LFS pointer .*git lfs pull"),
    "a web page": ("transformers", partial(content, data=b"<!doctype html><html>"), "a web page"),
    "JSON as weights": ("open_clip", partial(content, data=b'{"model_cfg": {"embed_dim": 4}}'),
                        "not weights|damaged"),
    "cut short": (
        "transformers", lambda f: content(f, weights_in(f).read_bytes()[:-1]),
        r"model\.safetensors: truncated or damaged .*; download it anew",
    ),
    "int8": ("open_clip", partial(weights, change=lambda w: {k: t.char() for k, t in w.items()}),
             "of another shape or type: .*of integers instead of .*of floats.*; download"),
    "another shape": ("open_clip", partial(weights, change=partial(of_a_shape, shape=(64, 32))),
                      r"type: text_projection \[64, 32\] of floats instead of \[64, 48\]"),
    "NaN": ("open_clip", partial(weights, change=with_nan),
            r"NaN or infinity in the weights.*: visual\.proj; take"),
    "a block without its keys": (
        "transformers",
        partial(
            weights, change=lambda w: {k: t for k, t in w.items() if "1.self_attn.k_" not in k},
        ),
        r"missing: .*resblocks\.1\.attn\.in_proj_.*; download",
    ),
    "one tower": (
        "open_clip",
        partial(weights, change=lambda w: {k: t for k, t in w.items() if "visual" not in k}),
        "missing: visual.*download",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_in_one_line_that_names_it(good, tmp_path, name):
    kind, change, message = WRONG[name]
    folder = tmp_path / "copy"
    shutil.copytree(good / kind, folder)
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        load(folder, "cpu")
    said = str(error.value)
    assert said.startswith(f"{folder}: ") and said.isprintable()
    assert len(said) < len(str(folder)) + 500 and "; " in said  # what to do


@pytest.mark.parametrize(
    "script, arguments",
    [("predict_zero_shot.py", ["--weights"]), ("models/convert.py", ["--format=open_clip", "out"])],
)
@pytest.mark.parametrize("name", ["nothing in it", "SigLIP", "Git LFS"])
def test_it_ends_a_script_in_that_line(good, tmp_path, script, arguments, name):
    kind, change, message = WRONG[name]
    shutil.copytree(good / kind, tmp_path / "copy")
    change(tmp_path / "copy")
    given = ["copy", *arguments] if arguments[0] != "--weights" else [*arguments, "copy"]
    assert re.search(message, error_line(script, *given, cwd=tmp_path))


@pytest.mark.parametrize("size", [500, 64_000])
def test_a_model_of_another_vocabulary_is_refused(good, tmp_path, size):
    shutil.copytree(good / "open_clip", tmp_path / "copy")
    put(tmp_path / "copy", f"{TEXT}.vocab_size", size)
    weights(tmp_path / "copy", lambda w: w | {"token_embedding.weight": torch.zeros(size, 64)})
    with pytest.raises(InputError, match=rf"has {size:,} tokens, not the 49,408 .*; take "):
        load(tmp_path / "copy", "cpu")


def test_the_description_decides_on_the_activation(good, tmp_path):
    """Weights do not tell it: the same ones are a model with either."""
    shutil.copytree(good / "open_clip", tmp_path / "copy")
    put(tmp_path / "copy", "model_cfg.quick_gelu", True)
    model, _ = load(tmp_path / "copy", "cpu")
    assert model.config.activation == "quick_gelu"
    assert load(good / "open_clip", "cpu")[0].config.activation == "gelu"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_without_description_ask_for_their_activation(good, tmp_path, kind):
    """Also in the folder of a run, whose arguments say nothing about a file put there."""
    (tmp_path / "run" / "weights").mkdir(parents=True)
    (tmp_path / "run" / "arguments.json").write_text("{}")
    file = tmp_path / "run" / "weights" / WEIGHTS[kind]
    save_file(load_file(good / kind / WEIGHTS[kind]), file)  # convert.py's describe their model
    told = r"--activation: quick_gelu for .*OpenAI, MetaCLIP and DFN.*; gelu for .*LAION, DataComp"
    with pytest.raises(InputError, match=rf"\.safetensors: .*{told}"):
        load(file, "cpu")
    assert load(file, "cpu", activation="gelu")[0].config.activation == "gelu"


PARTS = ["module", "_orig_mod", "model", "clip_model", "image_encoder", "net", "student",
         "ema_model", "_fsdp_wrapped_module"]  # fmt: skip


@given(
    prefix=st.lists(st.sampled_from(PARTS) | st.from_regex(r"[a-z_]{1,9}", fullmatch=True)),
    wrappers=st.lists(
        st.text(min_size=1, max_size=9).filter(lambda w: w not in ("epoch", "optimizer")),
        max_size=4,
    ),
)
def test_prefixes_and_wrappers_are_taken_off(prefix, wrappers):
    weights = {"ln_final.weight": torch.zeros(2), "visual.proj": torch.ones(3)}
    content = {".".join([*prefix, key]): tensor for key, tensor in weights.items()}
    content |= {"loss.weight": torch.zeros(1)} if prefix else {}
    for wrapper in wrappers:  # which may have any name, also one of the others
        content = {"epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}, wrapper: content}
    assert unwrap(content).keys() == weights.keys()


@pytest.mark.parametrize("inserted", ["module", "_orig_mod", "_fsdp_wrapped_module",
                                      "_checkpoint_wrapped_module"])  # fmt: skip
def test_what_torch_inserts_into_names_is_taken_out(inserted):
    """It wraps parts of a model too: a tower, or each block."""
    weights = create_model("ViT-demo").state_dict()
    wrapped = {
        key.replace("visual.", f"visual.{inserted}.").replace(
            "resblocks.1.", f"resblocks.1.{inserted}."
        ): tensor
        for key, tensor in weights.items()
    }
    assert wrapped.keys() != weights.keys()
    assert unwrap({"state_dict": wrapped}).keys() == weights.keys()
    assert "holds 2 CLIP models (module, the file itself)" in refused(
        weights | {f"module.{key}": tensor for key, tensor in weights.items()}
    )


def test_deepspeed_has_the_shapes_of_weights_beside_them():
    weights = create_model("ViT-demo").state_dict()
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    content = {"module": weights, "frozen_param_shapes": shapes, "param_shapes": [shapes],
               "optimizer": None, "ds_config": {"train_batch_size": 8}}  # fmt: skip
    assert unwrap(content).keys() == weights.keys()


def refused(content):
    with pytest.raises(InputError) as error:
        unwrap(content)
    return str(error.value)


def test_the_folder_of_a_run_stands_for_the_weights_that_it_chose(tmp_path):
    weights = tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    save_weights(create_model("ViT-demo"), weights / "best_epoch_weights.pth")
    assert find_weights(tmp_path / "run") == weights / "best_epoch_weights.pth"
    shutil.copy(weights / "best_epoch_weights.pth", weights / "wise_ft_weights.pth")
    assert find_weights(tmp_path / "run") == weights / "wise_ft_weights.pth"


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_folder_of_weights_may_have_runs_below_it(good, tmp_path, kind):
    """As the folder of a downloaded model in which someone trains."""
    shutil.copytree(good / kind, tmp_path / "copy")
    weights = tmp_path / "copy" / "2026-12-01" / "weights"
    weights.mkdir(parents=True)
    (weights / "best_epoch_weights.pth").touch()
    assert find_weights(tmp_path / "copy") == tmp_path / "copy"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "truncated or damaged"),
        ("[" * 10**5, "truncated or damaged"),
        ("[1]", "its description is not that of a CLIP "),
        ('{"embed_dim": 1}', "its description .*vision_cfg"),
    ],
)
def test_a_damaged_description_inside_safetensors_is_named(tmp_path, text, complaint):
    path = tmp_path / "strange.safetensors"
    weights = create_model("ViT-demo").state_dict()
    save_file(weights, path, metadata={"open_clip_config.json": text})
    with pytest.raises(InputError, match=rf"strange\.safetensors: {complaint}"):
        load(path, "cpu")
