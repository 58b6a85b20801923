"""Training steps on a GPU that is not there: nothing is on the wrong device, and the CPU never
waits for the GPU."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu, HostWaitsError
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from models import CLIP
from models.device import download
from models.preprocess import _on_device
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset
from utils.flickr8k_dataloader import TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.retrieval import encode
from utils.training.distillation import Distillation
from utils.training.gradients import accumulate_gradients
from utils.training.layer_groups import freeze_and_adapt, train_mode
from utils.training.optimizer import parameter_groups
from utils.training.progress import Progress
from utils.training.state import State

CUDA = torch.device("cuda", 0)
SMALL = {"vision_layers": 2, "transformer_layers": 1}
MODELS = {
    "ViT": replace(CONFIGS["ViT-demo"], **SMALL),
    "Chinese": replace(CONFIGS["cn-demo"], **SMALL),
    "ResNet": replace(
        CONFIGS["RN50"], vision_layers=(1, 1, 1, 1), vision_width=16, embed_dim=64,
        image_resolution=64, transformer_width=64, transformer_layers=2, transformer_heads=1,
    ),
}  # fmt: skip
ARGUMENTS = {
    "amp": True, "cache": True, "grad_cache": None, "lock_image": None, "lock_text": None,
    "lora": None, "distill": None, "grad_checkpointing": False, "model": "ViT",
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    _on_device.cache_clear()
    with FakeGpu(monkeypatch) as fake:
        yield fake
    _on_device.cache_clear()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Ten images with two captions each, of which two images share one."""
    root = tmp_path_factory.mktemp("data")
    entries = []
    for i in range(10):
        Image.fromarray(np.full((64, 64, 3), 20 * i, np.uint8)).save(root / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": ["a bird", f"{'a red ' * i}bird {i}"]})
    (root / "en_train.json").write_text(json.dumps(entries))
    return Flickr8kDataset(root)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"lock_image": 0},
        {"lock_text": 0, "lock_image": 1},
        {"model": "Chinese"},
        {"model": "ResNet"},
        *(
            pytest.param(changed, marks=pytest.mark.slow)
            for changed in (
                {"amp": False},
                {"cache": False},
                {"grad_cache": 3},
                {"lora": 4},
                {"distill": 5.0, "grad_cache": 3},
                {"grad_checkpointing": True},
                {"model": "Chinese", "lora": 2, "amp": False, "grad_checkpointing": True},
            )
        ),
    ],
    ids=str,
)
def test_steps_stay_on_the_gpu_and_let_the_cpu_run_ahead(gpu, dataset, changed):
    args = SimpleNamespace(**ARGUMENTS | changed)
    model = CLIP(MODELS[args.model]).initialize()
    dataset.prepare_for(model)
    vars(dataset).pop("tokens", None)  # of another model
    side = model.visual.input_resolution
    pixels = torch.zeros(len(dataset), 3, side, side, dtype=torch.uint8)
    dataset.cached = pixels.to(CUDA) if args.cache else None
    freeze_and_adapt(model, args.lock_image, args.lock_text, args.lora)
    model.to(CUDA)
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    start = CLIP(MODELS[args.model]).initialize().to(CUDA) if args.distill else None
    distillation = None
    if args.distill:
        unused = torch.arange(9).to(CUDA)
        distillation = Distillation(start, args.distill, ["image", "text"], unused)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.9, 0.1), lr=1e-3)
    state = State(model, optimizer, Precision(CUDA, args.amp))
    train_mode(model, is_from_scratch=True)

    loader = TrainLoader(dataset, 5, CUDA, captions_per_image=2, alter=bool(distillation))
    progress = Progress(loader, 1)
    for number, batch in enumerate(loader.epoch(1)):
        with gpu.step() if number else nullcontext():  # in the first, constants are copied
            loss = accumulate_gradients(
                model, batch, state.precision, ALONE, args.grad_cache, distillation
            )
            state.update(ALONE.sum(loss))
            progress.advance(state.losses[-1], 1e-3, number)
    assert (loss.device, loss.dtype, len(state.losses)) == (CUDA, torch.float32, 2)
    learned = {p for p in model.parameters() if p.requires_grad}
    assert optimizer.state.keys() == learned
    moments = [t for of_parameter in optimizer.state.values() for t in of_parameter.values()]
    assert {(t.device, t.dtype) for t in [*learned, *moments]} == {(CUDA, torch.float32)}


def test_scoring_lets_the_cpu_run_ahead(gpu, dataset, monkeypatch):
    model = CLIP(MODELS["ViT"]).initialize().to(CUDA)
    dataset.prepare_for(model)
    vars(dataset).pop("tokens", None)
    dataset.cached = torch.zeros(len(dataset), 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(encode, "TEXT_BATCH", 8)
    for step in (nullcontext(), gpu.step()):
        with step, torch.no_grad():  # not in inference mode, which fake tensors do not know
            images = encode.encode_images.__wrapped__(model, dataset, 4, num_workers=0)
            texts = encode.encode_texts.__wrapped__(model, dataset.tokens)
    assert (images.device, images.shape, texts.shape) == (CUDA, (10, 256), (20, 256))


def test_the_channels_of_a_resnet_lie_together_where_tensor_cores_compute(gpu):
    model = CLIP(MODELS["ResNet"]).initialize().to(CUDA)
    given = []
    model.visual.conv1.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    for amp in (True, False):
        with Precision(CUDA, amp).autocast():
            model.encode_image(torch.zeros(2, 3, 64, 64).to(CUDA))
    channels_last = [images.is_contiguous(memory_format=torch.channels_last) for images in given]
    assert channels_last == [True, False]


WAITS = {
    "reads a number": lambda x: x.sum().item(),
    "asks a number": lambda x: bool(x[0] > 0),
    "makes a list": lambda x: x.tolist(),
    "finds places": lambda x: x.nonzero(),
    "picks by a mask": lambda x: x[x > 0],
    "copies": lambda x: x.cpu(),
    "copies into": lambda x: torch.zeros(3).copy_(x, non_blocking=True),
    "copies from memory that is not pinned": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "waits for a number of this step": lambda x: download(x.sum())(),
    "waits for its copy": lambda x: torch.ones(3).pin_memory().to(CUDA),
    "sends a number": lambda x: torch.tensor([1.0], device=CUDA),
    "indexes from the CPU": lambda x: x[torch.tensor([0, 1])],
    "adds from the CPU": lambda x: x + torch.ones(3),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_makes_the_cpu_wait_is_found(gpu, what):
    x = torch.ones(3).to(CUDA)
    errors = (HostWaitsError, AssertionError, DataDependentOutputException)
    with pytest.raises((*errors, DynamicOutputShapeException)), gpu.step():
        WAITS[what](x)
