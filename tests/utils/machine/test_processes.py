"""Two and three processes against one with the same global batch."""

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from script_runs import ROOT, forks, run_script, start_script
from spawned import as_rank, in_processes, new_store
from tiny import NAMED, tiny_clip

from flickr8k.render_demo import render_demo
from models.clip import CLIP
from models.errors import InputError
from models.lora import add_lora
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset, contrastive_loss
from utils.flickr8k_dataloader import TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes, join_processes, torchrun_variables
from utils.retrieval.evaluation import Evaluator
from utils.training import gradients
from utils.training.distillation import Distillation
from utils.training.gradients import accumulate_gradients
from utils.training.layer_groups import train_mode

CPU = torch.device("cpu")
CASES = [(7, 1, 5), (7, 2, 3), (8, 1, 16), (3, 4, 4)]  # images, captions of each, channels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return render_demo(tmp_path_factory.mktemp("data"), n_train=23, n_val=11)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shards_are_even_and_cover_all_rows_in_order(size):
    for n in (size, 16, 23):
        shards = [Processes(rank, size).shard(n) for rank in range(size)]
        assert [row for s in shards for row in range(s.start, s.stop)] == list(range(n))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
        assert all(shard.total == n for shard in shards)


BIASES = None, torch.tensor(-10.0)  # of the softmax and of the sigmoid loss


def features_of(n, k, d):
    generator = torch.Generator().manual_seed(n * k)
    return torch.randn(n, d, generator=generator), torch.randn(n * k, d, generator=generator)


def text_ids(n, k):
    """Texts that images of several processes share; in the cases with one caption, none are."""
    return torch.arange(n * k).view(n, k) % (n if k > 1 else n * k)


def shared_losses(processes):
    results = []
    for (n, k, d), bias in product(CASES, BIASES):
        share = processes.shard(n)
        images, texts = features_of(n, k, d)
        images = images[share.start : share.stop].requires_grad_()
        texts = texts[share.start * k : share.stop * k].requires_grad_()
        scale = torch.tensor(2.0, requires_grad=True)
        ids = text_ids(n, k)[share.start : share.stop]
        loss = contrastive_loss(images, texts, scale, processes, ids, bias)
        gradients = torch.autograd.grad(loss, [images, texts, scale])
        results.append([loss.detach(), *gradients])
    return [[tensor.numpy() for tensor in case] for case in results]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_of_the_loss_and_their_gradients_are_those_of_one_process(size):
    parts = in_processes(size, shared_losses)
    for case, ((n, k, d), bias) in enumerate(product(CASES, BIASES)):
        inputs = [x.requires_grad_() for x in (*features_of(n, k, d), torch.tensor(2.0))]
        loss = contrastive_loss(*inputs, texts=text_ids(n, k), logit_bias=bias)
        images, texts, scale = torch.autograd.grad(loss, inputs)
        losses, of_images, of_texts, scales = zip(*(part[case] for part in parts), strict=True)
        assert sum(losses) == pytest.approx(loss.item(), rel=1e-6)
        assert sum(scales) == pytest.approx(scale.item(), rel=1e-5)
        for found, expected in ((of_images, images), (of_texts, texts)):
            difference = np.concatenate(found) - expected.numpy()
            assert np.linalg.norm(difference) <= 1e-5 * expected.norm()


def step_gradients(processes, data, chunk, rank=None):
    """With a `rank`, those of a model that learns changes of it, with features kept near those of
    another one."""
    torch.manual_seed(0)
    model, distillation = tiny_clip(NAMED["ViT-tiny"]), None
    if rank:
        add_lora(model, rank)
        distillation = Distillation(
            tiny_clip(NAMED["ViT-tiny"]), 3.0, ["image", "text"], torch.arange(9)
        )
    precision = Precision(CPU, use_amp=False)
    dataset = Flickr8kDataset(data, 32)
    loader = TrainLoader(dataset, 11, CPU, captions_per_image=2, processes=processes, alter=True)
    batch = next(loader.epoch(1))
    for _ in range(2):  # the first step learns the order in which gradients are sent
        model.zero_grad()
        loss = accumulate_gradients(model, batch, precision, processes, chunk, distillation)
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return processes.sum(loss).item(), gradients


@pytest.mark.parametrize(
    "size, chunk, rank", [(2, None, 2), pytest.param(3, 2, None, marks=pytest.mark.slow)]
)
def test_a_step_has_the_gradients_of_one_process_with_the_whole_batch(data, size, chunk, rank):
    expected_loss, expected = step_gradients(ALONE, data, None, rank)
    total = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in expected.values()))
    for loss, found in in_processes(size, step_gradients, data, chunk, rank):
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        for name, gradient in expected.items():
            bound = max(1e-5 * np.linalg.norm(gradient), 1e-7 * total)
            assert np.linalg.norm(found[name] - gradient) <= bound, name


def resnet_gradients(processes, data):
    """Those of fine-tuning in batches of two images, of which one is altered for distillation."""
    torch.manual_seed(0)
    config = replace(
        CONFIGS["RN50"], image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=8,
        transformer_layers=1, transformer_width=64, transformer_heads=1,
    )  # fmt: skip
    model, start = CLIP(config).initialize(), CLIP(config).initialize().requires_grad_(False)
    for each in (model, start):
        train_mode(each)
    loader = TrainLoader(Flickr8kDataset(data, 32), 2, CPU, processes=processes, alter=True)
    distillation = Distillation(start, 3.0, ["image", "text"], torch.arange(9))
    batch, precision = next(loader.epoch(1)), Precision(CPU, use_amp=False)
    accumulate_gradients(model, batch, precision, processes, distillation=distillation)
    return batch.altered is None, [p.grad.numpy() for p in model.visual.parameters()]


def test_a_process_without_altered_images_fine_tunes_a_resnet_with_the_other(data):
    _, expected = resnet_gradients(ALONE, data)
    total = np.sqrt(sum(np.linalg.norm(gradient) ** 2 for gradient in expected))
    has_none, parts = zip(*in_processes(2, resnet_gradients, data), strict=True)
    assert sorted(has_none) == [False, True]
    for found in parts:
        for part, gradient in zip(found, expected, strict=True):
            bound = max(1e-5 * np.linalg.norm(gradient), 1e-6 * total)
            assert np.linalg.norm(part - gradient) <= bound


def scores(processes, data):
    torch.manual_seed(0)
    model = tiny_clip(NAMED["ViT-tiny"])
    dataset = Flickr8kDataset(data, 32, is_train=False)
    loader = SimpleNamespace(batch_size=2, num_workers=0, captions_per_image=1)
    return Evaluator(loader, Precision(CPU, use_amp=False), processes).score(model, dataset)


@pytest.mark.slow
def test_sharded_evaluation_has_the_metrics_of_one_process(data):
    expected, expected_loss = scores(ALONE, data)
    for metrics, loss in in_processes(3, scores, data):
        assert metrics == expected
        assert loss == pytest.approx(expected_loss, rel=1e-6)


def read_rows(folder):
    (file,) = folder.glob("*/metrics.csv")
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


SCRATCH = ("--resume_training", "none", "--model", "ViT-tiny", "--batch_size", "11", "--lr", "1e-3",
           "--device", "cpu", "--dataset_path")  # fmt: skip


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(data, tmp_path):
    arguments = "--model", "ViT-demo", "--epochs", "2"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "train.py"), *SCRATCH, str(data), *arguments, "--log_dir", "two",
               "--save_steps", "1", "--grad_cache", "3"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" 2/2 ") == 1 and "2 processes" in done.stdout
    run_script("train.py", *SCRATCH, data, *arguments, "--log_dir", "one", cwd=tmp_path)
    two, one = read_rows(tmp_path / "two"), read_rows(tmp_path / "one")
    for row, expected in zip(two, one, strict=True):
        for name in ("train_loss", "val_loss"):
            assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4)


STEP = {"SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n1,n2"}  # fmt: skip


@pytest.mark.parametrize(
    "nodes, first",
    [  # what `scontrol show hostnames` puts first
        ("localhost", "localhost"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("node[009-012,3],login", "node009"),
        ("node[7,3]", "node7"),
        ("rack[1-2]-ib,rack3-ib", "rack1-ib"),
    ],
)
def test_the_first_process_of_an_srun_is_on_the_first_of_its_machines(nodes, first):
    assert torchrun_variables(STEP | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_what_srun_tells_a_process_is_taken_for_what_torchrun_tells():
    told = torchrun_variables(STEP)
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("3", "1", "4")
    assert 1024 <= int(told["MASTER_PORT"]) < 32768  # below those that Linux gives to connections
    assert told["MASTER_PORT"] != torchrun_variables(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "6000"}
    assert own.items() <= torchrun_variables(STEP | own).items()
    # Each task sees its own GPU alone, which has number 0 there.
    assert torchrun_variables(STEP | {"SLURM_GPUS_PER_TASK": "1"})["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        STEP | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=["a batch script that starts Python itself", "an interactive shell", "torchrun"],
)
def test_a_process_that_srun_has_not_started_beside_others_is_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert join_processes("cpu") == (ALONE, CPU)


def join_as_srun(variables, results):
    os.environ |= variables
    processes, device = join_processes(None)
    results.put((processes.sum(torch.tensor(processes.rank + 1)).item(), device.type))


@pytest.mark.slow
def test_two_processes_of_an_srun_compute_together():
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
                   "SLURM_JOB_ID": str(os.getpid()), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    results = forks().Queue()
    for rank in "01":
        variables = step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        forks().Process(target=join_as_srun, args=(variables, results)).start()
    assert [results.get(timeout=120) for _ in "01"] == [(3, "cpu")] * 2


def train_as_rank(rank, port, dies):
    """With `dies`, the process kills itself in its first step, as a machine that runs out of memory
    does to it."""
    as_rank(rank, 2, port)
    if dies:
        gradients.contrastive_loss = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def train_in_two_processes(cwd, *arguments, dies=None):
    """The exit code of each rank of train.py, and what it has written to standard error."""
    store = new_store()
    errors = [cwd / f"{rank}.txt" for rank in range(2)]
    started = [
        start_script(
            "train.py", *arguments, cwd=cwd, streams=(os.devnull, os.devnull, file),
            prepare=partial(train_as_rank, rank, store.port, rank == dies),
        )
        for rank, file in enumerate(errors)
    ]  # fmt: skip
    for process in started:
        process.join(120)
    return [
        (process.exitcode, file.read_text()) for process, file in zip(started, errors, strict=True)
    ]


def read_shared(processes, data):
    """What shares the data set's captions, and how often this process reads them, on two machines
    with two processes each; then the error of a folder without captions."""
    machine, local = divmod(processes.rank, 2)
    read = []

    def compute(folder):
        read.append(folder)
        return Flickr8kDataset(folder)

    with (
        patch.dict(os.environ, LOCAL_RANK=str(local)),
        patch("utils.machine.processes.gethostname", lambda: f"machine {machine}"),
    ):
        dataset = processes.shared(partial(compute, data))
        maps = Path("/proc/self/maps").read_text() if sys.platform == "linux" else "/shared"
        try:
            processes.shared(partial(compute, data / "images"))
        except InputError as error:
            return [*dataset.text], [*dataset.image], len(read), "/shared" in maps, str(error)


def test_a_machine_reads_the_data_once_for_all_its_processes(data):
    results = in_processes(4, read_shared, data)
    dataset = Flickr8kDataset(data)
    with pytest.raises(InputError) as raised:
        Flickr8kDataset(data / "images")
    for rank, (texts, images, read, mapped, error) in enumerate(results):
        assert texts == dataset.text and images == dataset.image
        assert read == (2 if rank % 2 == 0 else 0) and mapped and error == str(raised.value)


@pytest.mark.slow
def test_an_error_on_every_rank_ends_the_job_with_its_line(data, tmp_path):
    for code, printed in train_in_two_processes(tmp_path, *SCRATCH, data, "--batch_size", "999"):
        assert code == 2
        assert re.fullmatch(
            r"error: --batch_size 999 is more than the \d+ training images.*\n", printed
        )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(data, tmp_path):
    (code, printed), (killed, _) = train_in_two_processes(tmp_path, *SCRATCH, data, dies=1)
    assert killed == -signal.SIGKILL
    assert code == 1
    assert printed.splitlines()[-1].startswith("stopped: another process has ended")
