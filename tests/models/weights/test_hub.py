"""Weights by name, from a hub on this machine (tests/hub_server.py).

What the names stand for is compared with open_clip's own list; what comes of a repository with the
folder that it was made of.
"""

import ast
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from hub_server import running_hub
from open_clip.pretrained import _PRETRAINED
from open_clip_descriptions import DESCRIPTIONS, OWN
from open_clip_folders import siglip
from published import save_published
from safetensors.torch import load_file, save_file
from script_runs import ROOT, error_line, run_script, set_variables

from models import CLIP, clip_utils, load
from models.config import Config
from models.convert import convert
from models.errors import InputError
from models.weights import registry
from models.weights.hub import HUB, OPEN_CLIP, fetch, published_copy, repository_of
from models.weights.open_clip import from_open_clip
from models.weights.registry import CONFIGS, SHA256

# Earlier versions copy their settings, so that a test cannot change them.
huggingface_hub = pytest.importorskip("huggingface_hub", "1.0")
SMALL = Config(
    embed_dim=32, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16,
    vision_mlp_width=256, transformer_width=64, transformer_mlp_width=256, transformer_heads=1,
    transformer_layers=1, activation="gelu", mean=(0.5, 0.4, 0.3),
)  # fmt: skip
NAME = "ViT-B-32/laion2b_s34b_b79k"
LAION = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
THEIRS = "someone/clip_tuned.v2"
CHINESE = {  # names of cn_clip's configurations of both towers
    "OFA-Sys/chinese-clip-vit-base-patch16": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"),
    "OFA-Sys/chinese-clip-vit-large-patch14": ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese"),
    "OFA-Sys/chinese-clip-vit-large-patch14-336px": (
        "ViT-L-14-336",
        "RoBERTa-wwm-ext-base-chinese",
    ),
    "OFA-Sys/chinese-clip-vit-huge-patch14": ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese"),
    "OFA-Sys/chinese-clip-rn50": ("RN50", "RBT3-chinese"),
}
WANTED = ("open_clip_config.json", "open_clip_model.safetensors")
UNUSED = ("flax_model.msgpack", "tf_model.h5", "model.onnx", "README.md")


@pytest.fixture
def server():
    with running_hub() as server:
        yield server


@pytest.fixture(autouse=True)
def environment(server, tmp_path, monkeypatch):
    """The library, imported already, as if it had found the server and a cache in the environment;
    its attempts follow at once."""
    constants = huggingface_hub.constants
    template = server.root + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.root)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.chdir(tmp_path)


def offline(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def written(folder: Path, config: Config = SMALL, seed: int = 0, of: str = "open_clip") -> Path:
    """A folder of open_clip's or of transformers', with random weights."""
    torch.manual_seed(seed)
    convert(CLIP(config).initialize(), folder, of)
    for name in UNUSED:
        (folder / name).write_bytes(b"of no use here")
    return folder


def assert_same(ours: tuple, folder: Path | str) -> None:
    """Two models as `load` gives them: features and preprocessing are the same."""
    model, preprocess = ours
    expected, expected_preprocess = load(folder, "cpu")
    assert preprocess == expected_preprocess and model.config == expected.config
    side = expected.config.image_resolution
    torch.manual_seed(1)
    images, tokens = (
        torch.randn(2, 3, side, side),
        torch.randint(expected.config.vocab_size, (2, 7)),
    )
    with torch.inference_mode():
        assert model.encode_image(images).equal(expected.encode_image(images))
        assert model.encode_text(tokens).equal(expected.encode_text(tokens))


class TestTable:
    def test_it_has_every_tag_of_open_clip_but_those_of_cocas_and_of_files_without_description(
        self,
    ):
        theirs = {
            f"{architecture}/{tag}": c
            for architecture, tags in _PRETRAINED.items()
            for tag, c in tags.items()
            if "multimodal_cfg" not in DESCRIPTIONS[architecture]
        }
        served = {name for name, c in theirs.items() if c["hf_hub"].endswith("/")}
        assert OPEN_CLIP.keys() == served
        assert {name.partition("-")[0] for name in theirs.keys() - served} == {"ViTamin"}
        for name, row in OPEN_CLIP.items():
            assert f"{row.repository}/" == theirs[name]["hf_hub"]

    def test_sizes_are_those_of_models_that_open_clip_builds(self):
        """All resolutions, and the parameters of one model, since others take long to build."""
        for architecture in {name.partition("/")[0] for name in OPEN_CLIP}:
            description = DESCRIPTIONS[architecture]
            rows = [row for name, row in OPEN_CLIP.items() if name.startswith(f"{architecture}/")]
            assert {int(r.resolution) for r in rows} == {description["vision_cfg"]["image_size"]}
            if architecture == "ViT-B-16-SigLIP2":
                fields = {k: value for k, value in description.items() if k != "custom_text"}
                with torch.device("meta"):
                    model = open_clip.model.CustomTextCLIP(**fields)
                size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                assert {row.million_parameters for row in rows} == {f"{size:.1f}"}

    def test_activations_are_those_that_the_weights_were_trained_with(self):
        """open_clip's list tells them by tag. The names of its architectures tell them, too, where
        they end in -quickgelu; else it builds GELU, and warns if the tag says otherwise. Those of
        other towers than ours are described with the weights."""
        for name, row in OPEN_CLIP.items():
            architecture, tag = name.split("/")
            if architecture not in OWN:
                assert row.activation == ""
                continue
            told = _PRETRAINED[architecture][tag].get("quick_gelu", False)
            assert row.activation == ("quick_gelu" if told else "gelu")
            if DESCRIPTIONS[architecture].get("quick_gelu"):
                assert row.activation == "quick_gelu"

    def test_chinese_clips_are_as_large_as_cn_clips_models(self):
        """Which has BERT's pooler as well, whose weights are in no file."""
        theirs = pytest.importorskip("cn_clip.clip.model")
        folder = Path(theirs.__file__).parent / "model_configs"
        rows = {name: row for name, row in HUB.items() if name not in OPEN_CLIP}
        assert rows.keys() == CHINESE.keys()
        for name, (vision, text) in CHINESE.items():
            parts = [json.loads((folder / f"{part}.json").read_text()) for part in (vision, text)]
            sizes = parts[0] | parts[1]
            layers = sizes["vision_layers"]
            sizes["vision_layers"] = ast.literal_eval(layers) if isinstance(layers, str) else layers
            with torch.device("meta"):
                model = theirs.CLIP(**sizes)
            size = sum(p.numel() for key, p in model.named_parameters() if "pooler" not in key)
            assert rows[name].million_parameters == f"{size / 1e6:.1f}"
            assert int(rows[name].resolution) == sizes["image_resolution"]
            assert rows[name].repository == name and rows[name].activation == "quick_gelu"

    def test_openais_copies_are_described_as_openais_models(self):
        """By what open_clip describes them as, from which the repositories were made."""
        assert len(SHA256) == 9
        for name in SHA256:
            row = published_copy(name)
            assert row.repository.startswith("timm/") and row.repository.endswith(".openai")
            architecture = row.name.partition("/")[0]
            assert from_open_clip(DESCRIPTIONS[f"{architecture}-quickgelu"]) == CONFIGS[name]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "repository"),
        [
            (NAME, LAION),
            (f"hf-hub:{LAION}", LAION),
            (LAION, LAION),
            ("UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B", None),
            ("patrickjohncyh/fashion-clip", None),
            ("M-CLIP/XLM-Roberta-Large-Vit-B-32", None),
            ("hf-hub:ViT-B/33", "ViT-B/33"),
        ],
    )
    def test_of_repositories(self, name, repository):
        assert repository_of(name) == (repository or name)

    @pytest.mark.parametrize(
        "name",
        ["ViT-B/33", "ViT-B-32/laion2b_s34b_b79", "vitb32/openai", "weights/best.pth", "there/clip",
         "ViT-B-32", "hf-hub:clip", "https://host/owner/name", "../a/b", "a/b/c", "a b/c", ""],
    )  # fmt: skip
    def test_that_look_mistyped_are_no_repositories(self, name, tmp_path):
        (tmp_path / "there").mkdir()
        assert repository_of(name) is None

    def test_a_near_miss_is_answered_by_the_names_that_are_near(self, server):
        with pytest.raises(InputError, match=r"did you mean .*ViT-B-32/laion2b_s34b_b79k"):
            load("ViT-B-32/laion2b_s34b_b79")
        assert not server.requests

    def test_a_path_comes_before_a_repository(self, server, tmp_path):
        folder = written(tmp_path / THEIRS)
        assert_same(load(THEIRS, "cpu"), folder)
        assert not server.requests


@pytest.mark.parametrize("name", [NAME, f"hf-hub:{LAION}", LAION])
@pytest.mark.parametrize("of", ["open_clip", "transformers"])
def test_the_model_is_that_of_the_folder_and_is_downloaded_once(
    server, tmp_path, monkeypatch, name, of
):
    folder = written(tmp_path / "folder", of=of)
    server.add(LAION, folder)
    assert_same(load(name, "cpu"), folder)
    weights = "open_clip_model" if of == "open_clip" else "model"
    config = ["open_clip_config.json"] if of == "open_clip" else ["config.json"]
    preprocessor = [] if of == "open_clip" else ["preprocessor_config.json"]
    assert server.downloaded() == [*config, *preprocessor, f"{weights}.safetensors"]
    server.requests.clear()
    assert_same(load(name, "cpu"), folder)
    offline(monkeypatch)
    assert_same(load(name, "cpu"), folder)
    assert not server.requests


def test_a_model_that_open_clip_builds_comes_with_its_tokenizer(server, tmp_path, monkeypatch):
    siglip(tmp_path / "folder")
    server.add("timm/ViT-B-16-SigLIP", tmp_path / "folder")
    expected = load(tmp_path / "folder", "cpu")[0].tokenize("a star")
    for name in ("ViT-B-16-SigLIP/webli", "hf-hub:timm/ViT-B-16-SigLIP"):
        assert load(name, "cpu")[0].tokenize("a star").equal(expected)
        offline(monkeypatch)  # the second is in the cache
    first, *tokenizer, last = server.downloaded()
    assert (first, last) == ("open_clip_config.json", "open_clip_model.safetensors")
    assert sorted(tokenizer) == ["tokenizer.json", "tokenizer_config.json"]


def test_pickles_are_taken_where_there_are_no_safetensors(server, tmp_path):
    folder = written(tmp_path / "folder")
    torch.save(load_file(folder / "open_clip_model.safetensors"),
               folder / "open_clip_pytorch_model.bin")  # fmt: skip
    server.add(THEIRS, folder)
    load(THEIRS, "cpu")
    assert server.downloaded()[-1] == "open_clip_model.safetensors"
    del server.repositories[THEIRS]["open_clip_model.safetensors"]
    server.repositories["other/copy"] = server.repositories.pop(THEIRS)
    assert_same(load("other/copy", "cpu"), folder)
    assert server.downloaded()[-1] == "open_clip_pytorch_model.bin"


def test_the_chinese_resnet_is_in_a_file_of_its_authors(server, tmp_path):
    config = replace(
        CONFIGS["cn-demo"], image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=8,
        vision_patch_size=None, vision_mlp_width=None, text_positions=60, transformer_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    weights = CLIP(config).initialize().state_dict()
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"state_dict": {f"module.{k}": t for k, t in weights.items()}},
               folder / "clip_cn_rn50.pt")  # fmt: skip
    server.add("OFA-Sys/chinese-clip-rn50", folder)
    ours = load("OFA-Sys/chinese-clip-rn50", "cpu")
    assert_same(ours, folder / "clip_cn_rn50.pt")
    assert server.downloaded() == ["clip_cn_rn50.pt"] and ours[0].config == config


def test_weights_in_several_files(server, tmp_path):
    folder = written(tmp_path / "folder", of="transformers")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(weights)}
    for name in set(files.values()):
        part = {key: tensor for key, tensor in weights.items() if files[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    server.add(THEIRS, folder)
    assert_same(load(THEIRS, "cpu"), folder)


class TestBothFormats:
    @pytest.fixture
    def folders(self, server, tmp_path):
        """A repository with two models that differ in everything, so that a mixture shows."""
        other = replace(SMALL, activation="quick_gelu", mean=(0.1, 0.2, 0.3), vision_layers=2)
        folders = [written(tmp_path / "open_clip"),
                   written(tmp_path / "theirs", other, 1, "transformers")]  # fmt: skip
        server.add(THEIRS, folders[0])
        server.repositories[THEIRS] |= {f.name: f.read_bytes() for f in folders[1].iterdir()}
        return folders

    def test_open_clips_is_taken(self, server, folders):
        assert_same(load(THEIRS, "cpu"), folders[0])
        assert "config.json" not in server.downloaded()

    def test_a_description_without_weights_is_passed_over(self, server, folders):
        del server.repositories[THEIRS]["open_clip_model.safetensors"]
        assert_same(load(THEIRS, "cpu"), folders[1])

    def test_without_the_hub_what_is_cached_is_taken_if_it_is_whole(
        self, folders, tmp_path, monkeypatch
    ):
        """As after a program that took transformers' alone."""
        for file in ("config.json", "model.safetensors"):
            huggingface_hub.hf_hub_download(THEIRS, file)
        offline(monkeypatch)
        with pytest.raises(InputError, match=r"preprocessor_config\.json[^~]*not complete in"):
            load(THEIRS, "cpu")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.hf_hub_download(THEIRS, "preprocessor_config.json")
        offline(monkeypatch)
        assert_same(load(THEIRS, "cpu"), folders[1])


def test_a_download_that_broke_off_is_continued(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    folder = written(tmp_path / "folder")
    server.add(THEIRS, folder)
    huggingface_hub.hf_hub_download(THEIRS, "open_clip_config.json")
    server.breaks = [5000, 7000]
    for _ in range(2):  # the library goes on at once, or, in its versions 1, when it runs again
        with suppress(InputError):
            fetch(THEIRS)
    assert_same(load(THEIRS, "cpu"), folder)
    ranges = [
        asked for method, file, asked in server.requests if "safe" in file and method == "GET"
    ]
    assert ranges == [None, "bytes=5000-", "bytes=12000-"]


class TestOpenAI:
    COPY = "timm/vit_base_patch32_clip_224.openai"

    @pytest.fixture
    def archive(self, server, tmp_path, monkeypatch):
        """A small "ViT-B/32" in OpenAI's format, its copy on the hub, and no server at OpenAI's."""
        small = replace(SMALL, activation="quick_gelu", mean=CONFIGS["ViT-B/32"].mean)
        monkeypatch.setitem(CONFIGS, "ViT-B/32", small)
        monkeypatch.setattr(registry, "BASE_URL", "http://127.0.0.1:1")
        folder = written(tmp_path / "folder", small)
        weights = {k: t.half().float() for k, t in load(folder, "cpu")[0].state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        server.add(self.COPY, folder)
        return save_published(weights, tmp_path / "archive.pt")

    def test_the_copy_on_the_hub_is_the_same_model(self, server, archive, tmp_path, capsys):
        assert_same(load("ViT-B/32", "cpu", download_root=tmp_path / "root"), archive)
        told = [line for line in capsys.readouterr().err.splitlines() if self.COPY in line]
        assert len(told) == 2 and registry.weights_url("ViT-B/32") in told[0]
        server.requests.clear()
        assert_same(load("ViT-B/32", "cpu", download_root=tmp_path / "root"), archive)
        assert not server.requests and not capsys.readouterr().err

    def test_if_neither_can_be_had_both_are_named(self, server, archive, tmp_path):
        server.repositories.clear()
        with pytest.raises(InputError) as caught:
            load("ViT-B/32", "cpu", download_root=tmp_path / "root")
        for part in (registry.weights_url("ViT-B/32"), "save it as", f"{server.root}/{self.COPY}"):
            assert part in str(caught.value)

    def test_a_wrong_file_or_a_full_disk_is_no_reason_for_the_copy(
        self, server, archive, tmp_path, monkeypatch
    ):
        root = tmp_path / "root"
        root.mkdir()
        (root / "ViT-B-32.pt").write_bytes(b"something else")
        with pytest.raises(InputError, match="not weights"):
            load("ViT-B/32", "cpu", download_root=root)
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(InputError, match="cannot be saved"):
            load("ViT-B/32", "cpu", download_root=tmp_path / "file" / "root")
        assert not server.requests


def refused(name: str) -> str:
    """What is said about what cannot be had: advice in the first line."""
    with pytest.raises(InputError) as caught:
        fetch(name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and len(message) < 900
    return message


class TestRefusals:
    def test_a_repository_that_does_not_exist(self, server):
        wanted = LAION.replace("79K", "7")
        message = refused(wanted)
        assert f"{server.root}/{wanted} does not exist" in message
        assert f"did you mean {LAION}" in message

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_gated_repository(self, server, status):
        server.repositories[THEIRS] = dict.fromkeys(WANTED, b"{}")
        server.errors[THEIRS] = (status, "GatedRepo")
        message = refused(THEIRS)
        assert f"agree to the terms on {server.root}/{THEIRS}" in message and "HF_TOKEN" in message

    @pytest.mark.parametrize("status", [403, 500])
    def test_an_error_of_the_server(self, server, status):
        server.errors[THEIRS] = (status, "")
        message = refused(THEIRS)
        for part in (
            str(status),
            "HF_ENDPOINT=https://<mirror>",
            "open_clip_config.json",
            "model.safetensors",
            f"{server.root}/{THEIRS}/tree/main",
            "give that folder",
        ):
            assert part in message

    def test_no_connection(self, server, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        message = refused(NAME)
        assert "HF_ENDPOINT=https://<mirror>" in message and f"{LAION}/tree/main" in message
        assert "open_clip_model.safetensors" in message

    def test_offline(self, server, monkeypatch):
        offline(monkeypatch)
        assert "HF_HUB_OFFLINE" in refused(THEIRS)
        assert not server.requests

    def test_a_name_that_the_hub_does_not_allow(self):
        assert "Cannot have -- or .." in refused("someone/a..b")

    @pytest.mark.parametrize(
        ("files", "reason"),
        [
            ({"config.json": b'{"model_type": "bert"}'}, "model_type is 'bert', not clip"),
            ({"config.json": b'{"architecture": "vit_base"}'}, "model_type is None, not clip"),
            ({"config.json": b'{"model_type": ["clip"]}'}, "not that of a CLIP "),
            ({"RemoteCLIP.pt": b"", "README.md": b""}, "no weights of a CLIP"),
            ({"open_clip_config.json": json.dumps(DESCRIPTIONS["coca_ViT-B-32"]).encode()},
             "a CoCa, which also writes captions"),
            ({"config.json": b'{"model_type": "siglip"}'}, "ViT-B-16-SigLIP/webli"),
            ({"open_clip_config.json": b"[]"}, "should hold a description"),
        ],
    )  # fmt: skip
    def test_other_models_before_their_weights_are_downloaded(self, server, files, reason):
        weights = dict.fromkeys(("model.safetensors", "open_clip_model.safetensors"), b"weights")
        server.repositories[THEIRS] = files | (weights if "RemoteCLIP.pt" not in files else {})
        assert reason in refused(THEIRS)
        assert all(file.endswith("config.json") for file in server.downloaded())

    def test_a_download_that_breaks_off_again_and_again(self, server, tmp_path):
        server.add(THEIRS, written(tmp_path / "folder"))
        huggingface_hub.hf_hub_download(THEIRS, "open_clip_config.json")
        server.breaks = [0] * 100
        message = refused(THEIRS)
        assert "open_clip_model.safetensors" in message and "run it again" in message

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_cache_that_cannot_be_written(self, server, tmp_path):
        server.add(THEIRS, written(tmp_path / "folder"))
        (tmp_path / "cache").write_bytes(b"")
        assert "HF_HOME" in refused(THEIRS)


def test_the_place_of_downloaded_weights_is_printed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["clip_utils.py", "--model", NAME])
    server.add(LAION, written(tmp_path / "folder"))
    clip_utils.main()
    assert (Path(capsys.readouterr().out.strip()) / "open_clip_model.safetensors").is_file()


@pytest.mark.slow
def test_predict_puts_its_picture_into_the_working_folder(server, tmp_path):
    places = partial(set_variables, HF_ENDPOINT=server.root, HF_HOME=str(tmp_path / "home"))
    server.add(LAION, written(tmp_path / "folder"))
    run = tmp_path / "run"
    run.mkdir()
    picture = shutil.copy(ROOT / "R_mAP.png", run / "photo.png")
    run_script("predict.py", picture, "--weights", NAME, "--text", "a", "b", cwd=run,
               prepare=places)  # fmt: skip
    assert {file.name for file in run.iterdir()} == {"photo.png", "predictions"}
    assert not list((tmp_path / "home").rglob("predictions"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.py", ["--resume_training"]),
        ("predict.py", ["--weights"]),
        ("predict_zero_shot.py", ["--weights"]),
        ("utils/metric.py", ["--weights"]),
        ("models/convert.py", ["--format=open_clip", "out"]),
        ("models/clip_utils.py", ["--model"]),
    ],
)
def test_every_script_refuses_a_near_miss_by_the_names_that_are_near(script, arguments, tmp_path):
    """Without asking anybody: there is no server in the environment, and little time."""
    if script == "models/convert.py":
        arguments = ["ViT-B-32/laion2b_s34b_b79", *arguments[::-1]]
    else:
        arguments = [*arguments, "ViT-B-32/laion2b_s34b_b79"]
    line = error_line(script, *arguments, cwd=tmp_path)
    assert "neither a file" in line and NAME in line


@pytest.mark.slow
def test_packages_that_take_seconds_are_not_imported_for_a_local_file(tmp_path):
    folder = written(tmp_path / "folder")
    packages = {"huggingface_hub", "requests", "httpx", "httpx2", "sklearn", "torchvision",
                "pandas", "matplotlib", "pyzjr"}  # fmt: skip
    code = (
        "import runpy, sys; runpy.run_path('predict_zero_shot.py', run_name='__main__');"
        f"sys.exit(bool({packages} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, "--weights", str(folder)]
    assert subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode == 0
