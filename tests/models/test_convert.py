"""Converted weights, opened by the programs that they are for."""

import json
import stat
from dataclasses import replace

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from peers import disturb
from PIL import Image
from script_runs import ROOT, error_line, printed_by, printed_code, run_script
from tiny import NAMED, tiny_clip
from transformers import CLIPModel, CLIPProcessor

from models import load, tokenize
from models.convert import check_output, convert, main
from models.errors import InputError
from models.preprocess import open_image
from models.weights import onnx
from models.weights.formats import FORMATS
from utils.runs.checkpoint import save_weights

CAPTIONS = ["a red bird on a fence", "两只狗", "It's 10 o'clock, all's well!"]
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
TOWERS = {
    "ViT": {"image_size": 48, "layers": 2, "width": 160, "head_width": 80, "patch_size": 16},
    "ResNet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "best_epoch_weights.pth"
    save_weights(tiny_clip(NAMED["ViT-tiny"]), path)
    return path


@pytest.fixture
def ours(weights):
    model, preprocess = load(weights, "cpu")
    images = torch.stack([preprocess(open_image(ROOT / "R_mAP.png"))] * 2)
    with torch.no_grad():
        return model, images, model.encode_image(images), model.encode_text(tokenize(CAPTIONS))


@pytest.fixture(scope="module", params=TOWERS)
def pair(request, tmp_path_factory):
    """open_clip's model, and ours with its weights: GELU with a ViT, QuickGELU with a ResNet."""
    quick = request.param == "ResNet"
    text = TEXT | {"layers": 1} if quick else TEXT
    return make_pair(tmp_path_factory.mktemp("theirs"), TOWERS[request.param], text, quick)


def make_pair(folder, vision, text, quick=False):
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(48, vision, text, quick_gelu=quick).eval()
    disturb(theirs)
    torch.save(theirs.state_dict(), folder / open_clip.constants.HF_WEIGHTS_NAME)
    description = {"embed_dim": 48, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": description}))
    return theirs, load(folder, "cpu")[0]


def inputs(model, n):
    """Images, and texts with ends at several positions; what follows an end is no zero."""
    generator = torch.Generator().manual_seed(n)
    side = model.visual.input_resolution
    tokens = torch.randint(0, 49407, (n, 20), generator=generator)
    tokens[range(n), [1 + 5 * i % 19 for i in range(n)]] = 49407
    return torch.randn(n, 3, side, side, generator=generator), tokens


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """(folder of ONNX files with the weights of a pair, what convert.py printed, torch's programs).
    The weights of the ResNet lie beside the files, as those of a large model."""
    _, model = pair
    folder, programs = tmp_path_factory.mktemp("onnx"), []
    convert(model, folder / "weights.safetensors", "safetensors")
    export = torch.onnx.export

    def noted(*arguments, **how):
        programs.append(export(*arguments, **how))
        return programs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", noted)
        patch.setattr(onnx, "LARGEST_FILE", onnx.LARGEST_FILE if model.config.is_vit else 0)
        printed = printed_by(main, "weights.safetensors", "out", "--format", "onnx", cwd=folder)
    return folder / "out", printed, programs


def assert_onnx_gives(theirs, folder, model, tolerance):
    for tower, encode in (("image", theirs.encode_image), ("text", theirs.encode_text)):
        session = onnxruntime.InferenceSession(folder / f"{tower}.onnx")
        for n in (1, 5):
            x = inputs(model, n)[tower == "text"]
            name = "images" if tower == "image" else "tokens"
            (found,) = session.run([f"{tower}_features"], {name: x.numpy()})
            with torch.no_grad():
                expected = F.normalize(encode(x), dim=-1)
            torch.testing.assert_close(
                torch.from_numpy(found), expected, atol=tolerance, rtol=tolerance
            )


def assert_same(model, expected):
    assert model.config == expected.config
    state = model.state_dict()
    assert all(torch.equal(state[key], t) for key, t in expected.state_dict().items())


def test_open_clip_opens_it_and_we_do_again(weights, ours, tmp_path):
    model, images, image_features, text_features = ours
    run_script("models/convert.py", weights, "out", "--format", "open_clip", cwd=tmp_path)
    path = tmp_path / "out"
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    theirs.eval()
    with Image.open(ROOT / "R_mAP.png") as image, torch.no_grad():
        assert torch.equal(transform(image.convert("RGB")), images[0])
        torch.testing.assert_close(
            theirs.encode_image(images), image_features, atol=1e-4, rtol=1e-4
        )
        tokens = tokenize(CAPTIONS)
        torch.testing.assert_close(theirs.encode_text(tokens), text_features, atol=1e-4, rtol=1e-4)
    assert_same(load(path, "cpu")[0], model)


@pytest.mark.parametrize("half", [False, True])
def test_transformers_opens_it_and_we_do_again(weights, ours, tmp_path, half):
    """The weights of a run are float16, so that `--half` loses nothing of them. The features of
    transformers' float16 model have float16's accuracy."""
    model, images, image_features, text_features = ours
    options = ["--format", "transformers", *["--half"] * half]
    run_script("models/convert.py", weights, "out", *options, cwd=tmp_path)
    path = tmp_path / "out"
    theirs = CLIPModel.from_pretrained(path, dtype="auto").eval()
    assert theirs.dtype == (torch.float16 if half else torch.float32)
    processor = CLIPProcessor.from_pretrained(path)
    with Image.open(ROOT / "R_mAP.png") as image:
        given = processor(
            text=CAPTIONS, images=[image.convert("RGB")] * 2, return_tensors="pt", padding=True
        )
    own = tokenize(CAPTIONS)
    for row, mask, expected in zip(given.input_ids, given.attention_mask, own, strict=True):
        assert row[mask.bool()].tolist() == expected[: expected.argmax() + 1].tolist()
    tolerance = 1e-2 if half else 1e-4
    with torch.no_grad():
        for found, expected in [
            (theirs.get_image_features(images.to(theirs.dtype)), image_features),
            (theirs.get_text_features(own), text_features),
        ]:
            features = getattr(found, "pooler_output", found).float()
            torch.testing.assert_close(features, expected, atol=tolerance, rtol=tolerance)
    assert_same(load(path, "cpu")[0], model)


def test_one_safetensors_file_describes_its_model(weights, ours, tmp_path):
    options = ["--format", "safetensors", "--half"]
    run_script("models/convert.py", weights, "out.safetensors", *options, cwd=tmp_path)
    path = tmp_path / "out.safetensors"
    assert path.stat().st_size < 0.51 * sum(t.nbytes for t in ours[0].state_dict().values())
    (tmp_path / "open_clip_config.json").write_text('{"of": "another model"}')
    assert_same(load(path, "cpu")[0], ours[0])
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_a_round_trip_through_every_format_changes_nothing(pair, tmp_path):
    """From open_clip's model to ours, through each format of weights."""
    _, model = pair
    passed_on = model
    for name in ["open_clip", *["transformers"] * model.config.is_vit, "safetensors"]:
        path = tmp_path / f"{name}.safetensors"
        convert(passed_on, path, name)
        passed_on, _ = load(path, "cpu")
        assert_same(passed_on, model)


@pytest.mark.slow
def test_onnx_has_the_features_of_open_clip_and_no_paths_of_this_computer(pair, exported):
    (theirs, model), (folder, *_) = pair, exported
    assert (folder / "image.onnx.data").exists() == (not model.config.is_vit)
    assert not any(str(ROOT).encode() in path.read_bytes() for path in folder.iterdir())
    assert_onnx_gives(theirs, folder, model, 1e-4)


def test_half_the_size_keeps_the_features_within_float16s_accuracy(pair, tmp_path):
    _, model = pair
    for name in ["open_clip", "safetensors", *["transformers"] * model.config.is_vit]:
        path = tmp_path / f"{name}.safetensors"
        convert(model, path, name, half=True)
        back = load(path, "cpu")[0].state_dict()
        for key, tensor in model.state_dict().items():
            rounded = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(back[key], rounded), (name, key)
    assert all(t.dtype != torch.float16 for t in model.state_dict().values())


@pytest.mark.slow
def test_half_the_size_of_onnx_keeps_the_features_within_float16s_accuracy(tmp_path):
    theirs, model = make_pair(tmp_path, TOWERS["ViT"] | {"layers": 1}, TEXT | {"layers": 1})
    convert(model, tmp_path / "half", "onnx", half=True)
    assert_onnx_gives(theirs, tmp_path / "half", model, 1e-2)
    assert all(t.dtype != torch.float16 for t in model.state_dict().values())


@pytest.mark.slow
def test_onnx_answers_as_the_printed_code_says(pair, exported, monkeypatch):
    """Images are prepared by what stands in clip.json alone."""
    (_, model), (folder, printed, _) = pair, exported
    image = json.loads((folder / "clip.json").read_text("utf-8"))["image"]
    with Image.open(ROOT / "R_mAP.png") as picture:
        short = min(picture.size)
        size = [int(image["size"] * side / short) for side in picture.size]
        left, top = (round((side - image["size"]) / 2) for side in size)
        box = (left, top, left + image["size"], top + image["size"])
        resample = Image.Resampling[image["interpolation"].upper()]
        pixels = np.asarray(picture.convert("RGB").resize(size, resample).crop(box), np.float32)
    images = ((pixels / 255 - image["mean"]) / image["std"]).transpose(2, 0, 1)[None]
    texts = [*CAPTIONS, "bird " * 90]
    own_images = model.preprocess(open_image(ROOT / "R_mAP.png"))[None]
    with torch.no_grad():
        expected, _ = model(own_images, model.tokenize(texts, truncate=True))
    monkeypatch.chdir(folder.parent)
    for given in (texts, texts[:2]):  # shorter rows
        found = {"images": images.astype(np.float32), "texts": given}
        exec(printed_code(printed), found)
        logits = torch.from_numpy(found["logits"]).float()
        torch.testing.assert_close(logits, expected[:, : len(given)], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["open_clip", "transformers", "safetensors"])
def test_what_is_printed_opens_it(weights, tmp_path, monkeypatch, name):
    done = run_script("models/convert.py", weights, "o.safetensors", "--format", name, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(printed_code(done.stdout), {})


def test_nothing_is_overwritten_and_no_half_is_left(weights, tmp_path):
    (tmp_path / "out").mkdir()
    arguments = [weights, "out", "--format", "open_clip"]
    line = error_line("models/convert.py", *arguments, cwd=tmp_path)
    assert "out: exists already" in line
    resnet = replace(
        NAMED["ViT-tiny"], vision_layers=(1, 1, 1, 1), vision_width=8, vision_patch_size=None,
        vision_mlp_width=None,
    )  # fmt: skip
    save_weights(tiny_clip(resnet), tmp_path / "resnet.pth")
    arguments = ["resnet.pth", "new", "--format", "transformers"]
    line = error_line("models/convert.py", *arguments, cwd=tmp_path)
    assert "no CLIP with a ResNet" in line
    assert {path.name for path in tmp_path.iterdir()} == {
        "out", "resnet.pth", "open_clip_config.json"
    }  # fmt: skip


def test_missing_packages_are_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(InputError, match="pip install onnx onnxruntime onnxscript"):
        check_output(tmp_path / "out", "onnx")


@pytest.fixture
def small_disk():
    """Files end at 100,000 bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "onnx"])
def test_a_full_disk_leaves_nothing(name, small_disk, tmp_path):
    model = tiny_clip(*[NAMED["cn-tiny"]] * (name == "cn_clip")).eval()
    assert_nothing_is_left(model, tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["ViT"], indirect=True)
def test_a_full_disk_leaves_nothing_of_onnx(pair, exported, small_disk, tmp_path, monkeypatch):
    programs = iter(exported[-1])
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: next(programs))
    assert_nothing_is_left(pair[1], tmp_path, "onnx")


def assert_nothing_is_left(model, folder, to):
    with pytest.raises(InputError, match=r"out\.safetensors: cannot be written \(.*too large"):
        convert(model, folder / "out.safetensors", to)
    assert not any(folder.iterdir())


def test_weights_beyond_float16_are_refused(tmp_path):
    model = tiny_clip(NAMED["ViT-tiny"])
    with torch.no_grad():
        model.ln_final.weight[0] = 1e5
    with pytest.raises(InputError, match=r"65,504, which ln_final\.weight exceed; omit --half"):
        convert(model, tmp_path / "out", "open_clip", half=True)
    assert not any(tmp_path.iterdir())
