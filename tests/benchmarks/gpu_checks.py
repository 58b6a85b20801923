"""The parts of gpu.py that ask whether something works."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_settings import (
    Contender,
    Loop,
    Settings,
    distillation_from,
    free_memory,
    make_model,
)
from measure import ROOT, relative_differences
from script_runs import run_script, start_script
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from models.clip import CLIP
from models.errors import InputError
from utils.flickr8k_dataloader import Batch
from utils.machine.memory import IN_TRAINING, explained
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes, Shard
from utils.training.gradients import accumulate_gradients

LENGTHS = range(24, 33)
SHAPES = {  # of attention: sequences, heads, queries, keys; what the queries attend to
    "images of ViT-B/32": (256, 12, 50, 50, "all"),
    "images of ViT-L/14": (64, 16, 257, 257, "all"),
    "texts": (512, 8, 32, 32, "before"),
    "last tokens of texts": (512, 8, 1, 32, "some"),
    "texts of BERT": (512, 12, 32, 32, "some"),
}


def versions(settings: Settings) -> Iterator[Contender]:
    yield "software", partial(_software, settings)
    yield "attention", partial(_kernels, settings)


def _software(settings: Settings) -> dict[str, object]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if settings.on_gpu:
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "gib": torch.cuda.mem_get_info()[1] / 2**30,
        }
    return found


def _kernels(settings: Settings) -> dict[str, object]:
    chosen = {}
    for name, (n, heads, queries, keys, attended) in SHAPES.items():
        query, key = (
            torch.zeros(n, heads, length, 64, dtype=torch.bfloat16, device=settings.device)
            for length in (queries, keys)
        )
        mask = None
        if attended == "some":
            mask = torch.ones(n, 1, 1, keys, dtype=torch.bool, device=settings.device)
        number = torch._fused_sdp_choice(query, key, key, mask, 0.0, attended == "before")
        chosen[name] = SDPBackend(number).name
    return chosen


def lengths(settings: Settings) -> Iterator[Contender]:
    yield "as in models/attention.py", partial(_time_lengths, settings)
    yield "with cuDNN's", partial(_time_lengths, settings, with_cudnn=True)


def _time_lengths(settings: Settings, with_cudnn: bool = False) -> dict[str, object]:
    """Milliseconds of the first and of the second forward and backward pass at each length."""
    n = 2 if settings.tiny else 128
    torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
    found = {"first_ms": [], "second_ms": [], "finite": True}
    for length in LENGTHS:
        inputs = torch.randn(3, n, 8, length, 64, dtype=torch.bfloat16, device=settings.device)
        inputs.requires_grad_()
        for call in ("first_ms", "second_ms"):
            settings.synchronize()
            started = time.perf_counter()
            F.scaled_dot_product_attention(*inputs, is_causal=True).sum().backward()
            settings.synchronize()
            found[call].append(round(1e3 * (time.perf_counter() - started), 3))
        found["finite"] &= inputs.grad.isfinite().all().item()
    torch.backends.cuda.enable_cudnn_sdp(False)
    return found


class Case(NamedTuple):
    """A way to get loss and gradients, and how far, relatively, they may be from another way's."""

    tolerance: float
    other: str = "CPU"
    model: str = "ViT-B/32"
    tf32: bool = False
    amp: torch.dtype | None = None
    chunk: int | None = None
    lora: int | None = None
    distill: bool = False
    checkpointing: bool = False


HALF, BRAIN = torch.float16, torch.bfloat16
CASES = {
    "float32": Case(1e-4),
    "TF32": Case(2e-2, tf32=True),
    "bfloat16": Case(0.1, amp=BRAIN),
    "float16, after a step that was infinite": Case(2e-2, amp=HALF),
    "gradient caching": Case(1e-4, "float32", chunk=3),
    "gradient caching in bfloat16": Case(2e-2, "bfloat16", amp=BRAIN, chunk=3),
    "distillation from itself in bfloat16": Case(1e-3, "bfloat16", amp=BRAIN, distill=True),
    "checkpointing in bfloat16": Case(1e-3, "bfloat16", amp=BRAIN, checkpointing=True),
    "LoRA": Case(1e-4, lora=4),
    "BERT": Case(1e-4, model="cn-demo"),
    "ResNet": Case(1e-3, model="ResNet"),
}


def correctness(settings: Settings) -> Iterator[Contender]:
    """The CPU computes in float32."""
    compute = cache(partial(_loss_and_gradients, settings))

    def compare(case: Case) -> dict[str, object]:
        if case.other == "CPU":
            other = Case(0.0, model=case.model, lora=case.lora), torch.device("cpu")
        else:
            other = CASES[case.other], settings.device
        loss, gradients = compute(case, settings.device)
        expected, theirs = compute(*other)
        difference = max(abs(loss / expected - 1), *relative_differences(gradients, theirs))
        return _judged(difference, case.tolerance)

    for name, case in CASES.items():
        yield name, partial(compare, case)
    yield "crop in bfloat16", partial(_compare_crops, settings)


def _judged(difference: float, tolerance: float) -> dict[str, object]:
    return {"difference": difference, "tolerance": tolerance, "ok": difference <= tolerance}


def _batch(settings: Settings, model: CLIP) -> Batch:
    """32 images, the same on every device."""
    return next(settings.loader(model, 4 if settings.tiny else 32, alter=True).epoch(1))


def _loss_and_gradients(
    settings: Settings, case: Case, device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    is_resnet = case.model == "ResNet"
    config = settings.resnet() if is_resnet else settings.config(case.model, layers=4)
    model = make_model(config, device, case.lora)
    if case.checkpointing:
        model.enable_grad_checkpointing()
    precision = Precision(device, use_amp=bool(case.amp))
    precision.dtype = case.amp
    batch = _batch(settings, model)
    distillation = distillation_from(model) if case.distill else None
    compute = accumulate_gradients if case.tf32 else accumulate_gradients.__wrapped__
    compute = partial(compute, model, batch, precision, ALONE, case.chunk, distillation)
    if case.amp is HALF:  # a loss scale of 2**100, of which 2**12 are left after the first step
        precision.scaler = torch.amp.GradScaler(device.type, 2.0**100, backoff_factor=2.0**-88)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        compute()
        precision.update(model, optimizer, max_norm=1.0)
    loss = compute()
    gradients = {
        name: p.grad.cpu() / precision.scaler.get_scale()
        for name, p in model.named_parameters() if p.grad is not None
    }  # fmt: skip
    return loss.item(), gradients


def _compare_crops(settings: Settings) -> dict[str, object]:
    model = make_model(settings.config("ViT-B/32", layers=1), settings.device)
    batch = _batch(settings, model)
    expected = batch.augmented_images(model.preprocess)
    with torch.autocast(settings.device.type, BRAIN):
        found = batch.augmented_images(model.preprocess)
    return _judged((found - expected).abs().max().item(), 1e-5)


def waits(settings: Settings) -> Iterator[Contender]:
    for name, amp, lora, chunk, distill in (
        ("float32", False, None, None, False),
        ("bfloat16", True, None, None, False),
        ("gradient caching and distillation", True, None, 3, True),
        ("LoRA", True, 4, None, False),
    ):
        yield name, partial(_never_wait, settings, amp, lora, chunk=chunk, distill=distill)


def _never_wait(
    settings: Settings, amp: bool, lora: int | None, chunk: int | None, distill: bool
) -> dict[str, object]:
    model = make_model(settings.config("ViT-B/32", layers=4), settings.device, lora)
    distillation = distillation_from(model) if distill else None
    loop = Loop(settings, model, 8, Precision(settings.device, amp), chunk, distillation)
    loop.run(2)  # in the first step, constants are copied
    with _waiting_is_an_error(settings):
        loop.run(2)
    return {"steps": len(loop.state.losses)}


@contextmanager
def _waiting_is_an_error(settings: Settings) -> Iterator[None]:
    if settings.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if settings.on_gpu:
            torch.cuda.set_sync_debug_mode("default")


def train(settings: Settings) -> Iterator[Contender]:
    """A run of train.py that a signal stops after its first epoch, goes on, and is then scored by
    metric.py, as train.py has scored it at its end."""
    folder = settings.out / "train"
    folder.mkdir(parents=True, exist_ok=True)
    how = {"cwd": folder, "fresh": settings.on_gpu}
    printed: list[str] = []

    def scored(line: str) -> list[str]:
        """The last table in what was printed."""
        return re.findall(r"^validation.*\n.*\n.*", line, re.MULTILINE)[-1].splitlines()

    def resumed() -> dict[str, object]:
        (run,) = (folder / "logs").iterdir()
        printed.append(run_script("train.py", "--resume_training", run, **how).stdout)
        rows = (run / "metrics.csv").read_text("utf-8").splitlines()
        return {"last_epoch": dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))}

    def same_scores() -> dict[str, object]:
        (run,) = (folder / "logs").iterdir()
        size = 4 if settings.tiny else 64
        found = run_script("utils/metric.py", "--weights", run, "--use_amp", "--batch_size", size,
                           "--device", settings.device, **how).stdout  # fmt: skip
        theirs, ours = scored(printed[0]), scored(found)
        return {"ok": theirs == ours, "train": theirs, "metric": ours}

    yield "stopped", partial(_stop_after_an_epoch, settings, folder)
    yield "resumed", resumed
    yield "scored by metric.py", same_scores


def _stop_after_an_epoch(settings: Settings, folder: Path) -> dict[str, object]:
    model = make_model(settings.config("ViT-B/32"), torch.device("cpu"))
    torch.save(model.state_dict(), folder / "start.pth")
    arguments = ["--resume_training", "start.pth", "--activation", "quick_gelu", "--use_amp",
                 "--cache", "cache", "--dataset_path", settings.data, "--device", settings.device,
                 "--batch_size", 4 if settings.tiny else 64, "--epochs", 3]  # fmt: skip
    log = folder / "stopped.log"
    if settings.on_gpu:
        command = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
        with log.open("w", encoding="utf-8") as printed:
            process = subprocess.Popen(command, cwd=folder, stdout=printed, stderr=printed)
        code = process.poll
    else:
        process = start_script("train.py", *arguments, cwd=folder, streams=(os.devnull, log, log))
        code = partial(getattr, process, "exitcode")
    while not list(folder.glob("logs/*/metrics.csv")):
        if code() is not None:
            raise RuntimeError(f"it ends before its first epoch does, see {log}")
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    while code() is None:
        time.sleep(0.002)
    return {"ok": code() == 128 + signal.SIGTERM, "code": code()}


def memory(settings: Settings) -> Iterator[Contender]:
    yield "a step that does not fit", partial(_overfill, settings)


def _overfill(settings: Settings) -> dict[str, object]:
    """Steps that do not fit, between two that are equal."""
    model = make_model(settings.config("ViT-B/32"), settings.device)
    precision = Precision(settings.device, use_amp=True)
    batch = _batch(settings, model)
    images = 2**16 if settings.on_gpu else 2**40
    huge = Batch(batch.images[:1].expand(images, -1, -1, -1), None,
                 batch.tokens[:1].expand(images, -1))  # fmt: skip
    losses, message = [], "none: it fits"
    for _ in range(2):
        losses.append(accumulate_gradients(model, batch, precision, ALONE).item())
        try:
            with explained(IN_TRAINING):
                accumulate_gradients(model, huge, precision, ALONE)
        except InputError as error:
            message = str(error)
        free_memory()
    return {"ok": losses[0] == losses[1] and "memory is full" in message, "message": message}


def nccl(settings: Settings) -> Iterator[Contender]:
    backend = "cpu:gloo,cuda:nccl" if settings.on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield "sums and gathered features", partial(_exchange, settings)
        if settings.on_gpu:  # there is no SyncBatchNorm on a CPU
            yield "SyncBatchNorm", partial(_compare_norms, settings)
    finally:
        dist.destroy_process_group()


def _exchange(settings: Settings) -> dict[str, object]:
    """What the first of two processes gets where there is no second."""
    processes, rows = Processes(0, 2), torch.randn(4, 8, device=settings.device, requires_grad=True)
    everyone = Shard(0, 4, 8).gather(rows)
    weights = torch.randn(8, 8, device=settings.device)
    everyone.backward(weights)
    mine = rows.detach()
    same = [
        (everyone, torch.cat([mine, torch.zeros_like(mine)])),
        (rows.grad, weights[:4]),
        (processes.sum(mine.clone()), mine),
    ]
    return {"ok": all(torch.equal(*pair) for pair in same) and processes.any(True)}


def _compare_norms(settings: Settings) -> dict[str, object]:
    """Steps with norms of the batch of all processes and with those of one process."""
    found = []
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda model: model):
        model = convert(make_model(settings.resnet(), settings.device))
        precision = Precision(settings.device, use_amp=False)
        accumulate_gradients.__wrapped__(model, _batch(settings, model), precision, ALONE)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return _judged(max(relative_differences(*found)), 1e-4)
