"""The benchmarks at tiny sizes: the checks inside them hold, and their tables are printed."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from peers import open_clip_model
from script_runs import ROOT, run_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flickr8k.render_demo import render_demo
from models import build_model, tokenize
from models.clip_utils import create_model
from models.errors import InputError
from models.weights.registry import CONFIGS
from utils.data.annotations import read_annotations

sys.path.append(str(ROOT / "tests" / "benchmarks"))

import cold_start
import evaluation
import gpu
import grad_cache
import image_search
import locked_towers
import loss
import measure
import memory
import model_needs
import real_towers
import start_up
import text_encoding
import tokenizing
import train_step
import training

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


IN_THIS_PROCESS = {
    "in_a_process": lambda function, *arguments: function(*arguments),
    "extra_peak_megabytes": lambda function: (function(), 1.0)[1],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=20, n_val=8)


@pytest.fixture
def rows(monkeypatch, capsys):
    """Run a benchmark's main() with arguments; the first cells of the rows it prints."""

    def run(benchmark, *arguments):
        # In this process, where small things may find room in memory that others have left.
        for name, stand_in in IN_THIS_PROCESS.items():
            monkeypatch.setattr(benchmark, name, stand_in, raising=False)
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *map(str, arguments)])
        benchmark.main()
        return first_cells(capsys.readouterr().out)

    return run


def first_cells(printed: str) -> list[str]:
    return re.findall(r"^\| (.*?) +\|.*\|$", printed, re.MULTILINE)


@pytest.mark.slow
def test_train_step(rows, data):
    small = ["--model", "ViT-demo", "--layers", 1, "--batch_size", 4, 8, "--rounds", 1]
    printed = rows(train_step, "--data", data, *small, "--side", 64)
    assert printed.count("ours") == printed.count("transformers") == 2


@pytest.mark.slow
def test_text_encoding(rows, data):
    printed = rows(text_encoding, "--data", data, "--model", "ViT-demo", "--batch_size", 16)
    assert printed[2:] == ["ours", "open_clip", "open_clip, text cut", "transformers"]


def test_tokenizing(rows, data):
    printed = rows(tokenizing, "--data", data, "--rounds", 1)
    assert printed[2:] == ["ours", "open_clip", "transformers (Rust)"]


@pytest.mark.slow
def test_chinese_models(rows, data):
    pytest.importorskip("cn_clip", reason="needs cn_clip")
    small = ["--data", data, "--model", "cn-demo", "--layers", 1]
    printed = rows(train_step, *small, "--batch_size", 4, "--rounds", 1, "--side", 64)
    assert printed[2:] == ["ours", "cn_clip", "transformers"]
    assert rows(text_encoding, *small)[2:] == ["ours", "cn_clip", "transformers"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_evaluation(rows):
    printed = rows(evaluation, "--compared", 40, "--images", 60, "--rounds", 1)
    assert "a sort a query" in printed and "60 images, 300 captions" in printed


def test_model_needs(monkeypatch):
    """An exponential keeps its result, a product both factors: weights count as parameters."""
    monkeypatch.setattr(model_needs, "features", lambda model, n: model(torch.ones(n, 6)).exp())
    model = torch.nn.Linear(6, 4)
    assert model_needs.kept(model, 5) == 4 * (5 * 6 + 5 * 4)
    monkeypatch.setattr(model_needs, "features", lambda model, n: model(torch.ones(n, 6)).sum())
    assert model_needs.operations(model) == 2 * 2 * 6 * 4  # forward, and the weight's gradient


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_image_search(rows):
    assert rows(image_search, "--images", 300, "--rounds", 2)[-2:] == ["ours", "a sort in float64"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_loss(rows):
    assert rows(loss, "--batch_size", 64, "--rounds", 1)[-2:] == ["ours", "open_clip"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_grad_cache(rows):
    printed = rows(grad_cache, "--model", "ViT-demo", "--batch_size", 8, "--chunk", 3, "--check", 7)
    assert printed[-2:] == ["batch 3", "batch 8 in chunks of 3"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory(rows, data):
    small = ["--model", "ViT-demo", "--layers", 1, "--batch_size", 4]
    assert rows(memory, "--data", data, *small)[2:] == ["float32", "bfloat16"]


@pytest.mark.slow
def test_locked_towers(rows, data):
    printed = rows(locked_towers, "--data", data, "--model", "ViT-demo", "--batch_size", 4,
                   "--rounds", 1)  # fmt: skip
    assert printed[2] == "nothing locked" and printed[-1] == "--lock_image --cache_features"


@pytest.mark.slow
def test_start_up(tmp_path, data):
    (tmp_path / "first_step.py").write_text(start_up.FIRST_STEP)
    scratch = ["--resume_training", "none", "--model", "ViT-demo", "--batch_size", 4]
    done = run_script(tmp_path / "first_step.py", *scratch, "--dataset_path", data, "--log_dir",
                      tmp_path / "logs", cwd=ROOT)  # fmt: skip
    assert float(done.stdout.rpartition("CPU seconds:")[2]) > 0
    assert len(list((tmp_path / "logs").iterdir())) == 1  # the run that began


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="memory is read by wait4")
def test_cold_start(tmp_path, data, capsys):
    archive = str(tmp_path / "archive.pt")
    cold_start.make_archive(archive, "ViT-demo", 1)
    image = str(next((data / "images").glob("val_*.png")))
    commands = cold_start.commands(archive, image, clip_python=None)
    (tmp_path / "open_clip.py").write_text(cold_start.OPEN_CLIP)
    runs = {}
    for name, (script, *arguments) in {
        "ours": commands["ours"][1:],
        "open_clip": [str(tmp_path / "open_clip.py"), *commands["open_clip"][3:]],
    }.items():
        done = run_script(script, *arguments, cwd=tmp_path)
        runs[name] = [cold_start.Run(done.stdout, 2.0, 400.0)]
    cold_start.check_answers({name: taken[0].printed for name, taken in runs.items()})
    cold_start.print_results("ViT-demo", runs)
    printed = capsys.readouterr().out
    assert "ours and open_clip: probabilities differ" in printed
    assert first_cells(printed)[2:] == ["ours", "open_clip"]
    assert cold_start.run([sys.executable, "-c", "print(1)"]).printed == "1\n"


def test_real_towers_are_chosen_on_images_that_nothing_else_uses(data, tmp_path, monkeypatch):
    monkeypatch.setattr(real_towers, "CHOOSING", 5)
    folder = real_towers.make_data(data, tmp_path / "data", 10)
    train, val, test = (
        {image for image, _ in read_annotations(folder / f"en_{split}.json")}
        for split in ("train", "val", "test")
    )
    assert (len(train), len(val), len(test)) == (10, 5, 8)
    assert len(train | val | test) == 10 + 5 + 8
    with pytest.raises(InputError, match="--images 16: there are 20, of which 5 choose"):
        real_towers.make_data(data, tmp_path / "data", 16)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a fork server")
def test_gpu(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_in_time", gpu.run_part)
    arguments = ["--device", "cpu", "--tiny", "--data", data, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    gpu.main()
    written = (tmp_path / "results.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in written.splitlines()]
    assert {line["part"] for line in lines} == gpu.PARTS.keys()
    assert not [line for line in lines if "error" in line or line.get("ok") is False]
    assert set(written.splitlines()) <= set(capsys.readouterr().out.splitlines())


def test_a_failed_contender_does_not_cost_those_after_it(tmp_path, monkeypatch, capsys):
    def part(settings):
        yield "divided", lambda: {"quotient": 1 / 0}
        yield "multiplied", lambda: {"product": 2 / 3}

    monkeypatch.setattr(gpu, "import_module", lambda name: SimpleNamespace(loop=part))
    settings = gpu.Settings(torch.device("cpu"), tmp_path, tmp_path, batch=2, tiny=True)
    gpu.run_part("loop", settings)
    written = (tmp_path / "results.jsonl").read_text("utf-8").splitlines()
    failed, good = map(json.loads, written)
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert good.items() >= {"part": "loop", "contender": "multiplied", "product": 0.6667}.items()
    assert capsys.readouterr().out.splitlines() == written


@pytest.mark.parametrize("wrong", [0.2, float("nan")])
def test_a_difference_is_never_passed_over(wrong):
    with pytest.raises(ArithmeticError, match="scores differ by"):
        measure.check("scores", [0.0, wrong, 0.01], 0.1)
    measure.check("scores", [0.0, 0.1], 0.1)


@pytest.mark.parametrize("weight", ["visual.proj", "transformer.resblocks.0.mlp.c_fc.bias"])
def test_a_changed_weight_is_noticed(weight):
    theirs = open_clip_model("ViT-demo")
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    weights[weight].mul_(1.01)
    peers = {"open_clip": (theirs, training.open_clip_loss)}
    tokens = tokenize(["a red ball", "two dogs", "a cat"])
    with pytest.raises(ArithmeticError):
        training.check_agreement(build_model(weights), peers, torch.randn(3, 3, 64, 64), tokens)


def test_step_flops_are_those_that_torch_counts():
    """But for what causal attention does not look at, which its counter takes for work too."""
    name, n = "ViT-demo", 3
    model, config = create_model(name), CONFIGS[name]
    tokens = tokenize(["a red ball", "a dog runs", "two big cats"])
    lengths = tokens.argmax(dim=1) + 1
    assert (lengths == lengths[0]).all()  # without padding
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        images = torch.randn(n, 3, 64, 64)
        training.our_loss(model, images, tokens).backward()
    length, width = int(lengths[0]), config.transformer_width
    unseen = n * length * (length - 1) // 2 * (config.transformer_layers - 1)
    recomputed = 2 * n * n * config.embed_dim  # the loss makes its matrix anew for the gradient
    expected = counter.get_total_flops() - 3 * 4 * unseen * width - recomputed
    assert training.step_flops(config, tokens) == expected
