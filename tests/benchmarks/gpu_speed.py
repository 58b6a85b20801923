"""The parts of gpu.py that ask how fast something is, in mixed precision."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from gpu_settings import Contender, Loop, Settings, distillation_from, make_model
from measure import alternate, matmul
from peers import open_clip_model, transformers_model
from torch import Tensor, nn
from torch.profiler import DeviceType, ProfilerActivity
from training import (
    Loss,
    adamw,
    open_clip_loss,
    our_loss,
    step_flops,
    train,
    transformers_loss,
)

from models import build_model
from models.weights.architecture import infer_config
from utils import Flickr8kDataset
from utils.machine.memory import peak_memory_mb
from utils.machine.precision import Precision

WARMUP, STEPS = 4, 16
CHECKED = 8  # pairs whose loss is compared


def loop(settings: Settings) -> Iterator[Contender]:
    for distill in (False, True):
        name = "distillation" if distill else "training alone"
        yield name, partial(_time_loop, settings, distill, is_compiled=False)
        yield f"profile of {name}", partial(_profile_loop, settings, distill)
    for distill in () if settings.tiny else (False, True):
        name = "distillation" if distill else "training alone"
        yield f"{name}, compiled", partial(_time_loop, settings, distill, is_compiled=True)


def _loop(settings: Settings, distill: bool, is_compiled: bool = False) -> Loop:
    """The loop of train.py, after its first steps."""
    model = make_model(settings.config("ViT-B/32"), settings.device)
    distillation = distillation_from(model) if distill else None
    precision = Precision(settings.device, use_amp=True)
    loop = Loop(settings, model, settings.batch, precision, distillation=distillation)
    if is_compiled:
        model.compile_towers()
        if distillation:
            distillation.start.compile_towers()
    loop.run(1 if settings.tiny else WARMUP)
    settings.synchronize()
    return loop


def _time_loop(settings: Settings, distill: bool, is_compiled: bool) -> dict[str, object]:
    begun = time.perf_counter()
    loop = _loop(settings, distill, is_compiled)
    waited, steps = loop.progress.seconds_waited, 1 if settings.tiny else STEPS
    started = time.perf_counter()
    loop.run(steps)
    settings.synchronize()
    seconds = time.perf_counter() - started
    return {
        "images_per_s": steps * settings.batch / seconds,
        "step_ms": 1e3 * seconds / steps,
        "waits_for_data": (loop.progress.seconds_waited - waited) / seconds,
        "warmup_s": started - begun,
        "peak_gib": peak_memory_mb(settings.device) / 2**10,
    }


def _profile_loop(settings: Settings, distill: bool) -> dict[str, object]:
    """The share of the time in which the GPU computes nothing, and of that in which it computes,
    the shares of the kernels that take longest."""
    loop = _loop(settings, distill)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * settings.on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        loop.run(1 if settings.tiny else 5)
        settings.synchronize()
    kind = DeviceType.CUDA if settings.on_gpu else DeviceType.CPU
    kernels = [e for e in profile.events() if e.device_type == kind and not e.is_user_annotation]
    kernels.sort(key=lambda event: event.time_range.start)
    busy, end, taken = 0.0, kernels[0].time_range.start, dict.fromkeys((e.name for e in kernels), 0)
    for kernel in kernels:
        span = kernel.time_range
        busy += max(0.0, span.end - max(span.start, end))
        end = max(span.end, end)
        taken[kernel.name] += span.end - span.start
    longest = sorted(taken, key=taken.get, reverse=True)[:15]
    shares = {name[:90]: round(taken[name] / sum(taken.values()), 3) for name in longest}
    return {"idle": 1 - busy / (end - kernels[0].time_range.start), "kernels": shares}


def vit_b(settings: Settings) -> Iterator[Contender]:
    return _contenders(settings, "ViT-B/32")


def vit_l(settings: Settings) -> Iterator[Contender]:
    return _contenders(settings, "ViT-L/14")


class Contest(NamedTuple):
    """What is the same for all: models with these weights take steps with these captions."""

    settings: Settings
    weights: dict[str, Tensor]
    tokens: Tensor

    def steps(
        self, make: Callable[[], nn.Module], loss: Loss, is_compiled: bool
    ) -> dict[str, object]:
        """Steps with the same images, and with captions in some lots, which take turns. TFLOP are
        those that the result cannot do without (see `training.step_flops`)."""
        settings = self.settings
        device, n, lots = settings.device, settings.batch, 1 if settings.tiny else WARMUP
        config = infer_config(self.weights)
        model = make().to(device).train()
        optimizer = adamw(model)
        autocast = torch.autocast(device.type, torch.bfloat16)
        torch.manual_seed(0)
        images = torch.randn(n, 3, *[config.image_resolution] * 2, device=device)
        texts = [self.tokens[torch.randint(len(self.tokens), (n,))] for _ in range(lots)]
        with torch.no_grad(), autocast:
            checked = loss(model, images[:CHECKED], texts[0][:CHECKED]).item()
        if is_compiled:
            torch.compiler.reset()
            model.compile_towers() if loss is our_loss else model.compile()
        steps = texts * (2 if settings.tiny else 5)
        started = time.perf_counter()
        seconds = alternate(
            {"step": lambda texts: train(model, loss, optimizer, images, texts, autocast)},
            steps,
            settings.synchronize,
        )["step"]
        step = median(seconds[lots - 1 :])
        flops = sum(step_flops(config, lot) for lot in texts) / lots
        product = self._product()
        return {
            "images_per_s": n / step,
            "step_ms": 1e3 * step,
            "tflop_per_s": flops / step / 1e12,
            "product_tflop_per_s": product / 1e12,
            "of_product": flops / step / product,
            "peak_gib": peak_memory_mb(device) / 2**10,
            "all_steps_s": time.perf_counter() - started,
            "loss_of_8": checked,
        }

    def _product(self) -> float:
        """FLOP/s of a product of two bfloat16 matrices."""
        side = 256 if self.settings.tiny else 8192
        product = matmul(side, torch.bfloat16, self.settings.device)
        seconds = alternate({"product": product}, range(11), self.settings.synchronize)
        return 2 * side**3 / median(seconds["product"])


def _contenders(settings: Settings, name: str) -> Iterator[Contender]:
    layers = 1 if settings.tiny else None
    theirs = open_clip_model("ViT-demo" if settings.tiny else name, layers, layers)
    contest = Contest(settings, theirs.state_dict(), Flickr8kDataset(settings.data).tokens)
    models: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
        "ours": (lambda: build_model(copy.deepcopy(contest.weights)), our_loss),
        "open_clip": (lambda: copy.deepcopy(theirs), open_clip_loss),
        "transformers": (lambda: transformers_model(contest.weights), transformers_loss),
    }
    for is_compiled in (False,) if settings.tiny else (False, True):
        for peer, (make, loss) in models.items():
            title = f"{peer}, compiled" if is_compiled else peer
            yield title, partial(contest.steps, make, loss, is_compiled)
