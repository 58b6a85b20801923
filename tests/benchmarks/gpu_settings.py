"""What the parts of gpu.py share: settings, models, batches, the training loop."""

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import measure  # noqa: F401 - finds the repository's packages
import torch

from models.clip import CLIP
from models.config import Config
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset
from utils.flickr8k_dataloader import Batch, TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.training.distillation import Distillation
from utils.training.gradients import accumulate_gradients
from utils.training.layer_groups import TOWERS, freeze_and_adapt, train_mode
from utils.training.optimizer import parameter_groups
from utils.training.progress import Progress
from utils.training.state import State

Contender = tuple[str, Callable[[], dict[str, object]]]  # a name, and what it measures


@dataclass(frozen=True)
class Settings:
    """What every part is told."""

    device: torch.device
    data: Path  # a folder as for train.py
    out: Path  # the folder of the results
    batch: int  # images in a step whose speed is measured
    tiny: bool  # small models, batches and matrices, few steps

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def config(self, model: str, layers: int | None = None) -> Config:
        """The model of that name, or the small one that takes its place; `layers` in each tower."""
        config = CONFIGS[model]
        if self.tiny:
            config, layers = CONFIGS[model if model == "cn-demo" else "ViT-demo"], 1
        return replace(config, vision_layers=layers or config.vision_layers,
                       transformer_layers=layers or config.transformer_layers)  # fmt: skip

    def resnet(self) -> Config:
        """A ResNet with one block in each stage."""
        config = replace(CONFIGS["RN50"], vision_layers=(1, 1, 1, 1), transformer_layers=1)
        if self.tiny:
            config = replace(config, vision_width=16, embed_dim=64, image_resolution=64,
                             transformer_width=64, transformer_heads=1)  # fmt: skip
        return config

    def loader(
        self, model: CLIP, batch: int, alter: bool = False, cache: bool = False
    ) -> TrainLoader:
        """Batches for `model`, on its device; with `cache` their pixels are there."""
        language = "cn" if model.config.text_tower == "bert" else "en"
        dataset = Flickr8kDataset(self.data, language=language, model=model)
        if cache:
            dataset.cache(self.out / "cache", model.device)
        return TrainLoader(dataset, batch, model.device, captions_per_image=2, alter=alter)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()


def make_model(config: Config, device: torch.device, lora: int | None = None) -> CLIP:
    """A model with random weights, the same on every device, ready to be trained."""
    torch.manual_seed(0)
    model = CLIP(config).initialize()
    freeze_and_adapt(model, lock_image=None, lock_text=None, lora=lora)
    train_mode(model.to(device), is_from_scratch=True)
    return model


def distillation_from(model: CLIP) -> Distillation:
    """Distillation of `model` from itself as it is now."""
    start = copy.deepcopy(model).requires_grad_(False)
    unused = torch.arange(9, device=model.device)
    return Distillation(start, 6.0, [*TOWERS], unused)


class Loop:
    """The loop of train.py over cached images."""

    def __init__(
        self,
        settings: Settings,
        model: CLIP,
        batch: int,
        precision: Precision,
        chunk: int | None = None,
        distillation: Distillation | None = None,
    ):
        self.loader = settings.loader(model, batch, alter=bool(distillation), cache=True)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.9, 0.1), lr=1e-7)
        self.state = State(model, optimizer, precision, distillation=distillation)
        self.chunk = chunk
        self.progress = Progress(self.loader, 1)
        self.batches = self.progress.timed(self._batches())

    def _batches(self) -> Iterator[Batch]:
        for epoch in count(1):
            yield from self.loader.epoch(epoch)

    def run(self, steps: int) -> None:
        """Take so many steps."""
        state = self.state
        for batch in islice(self.batches, steps):
            loss = accumulate_gradients(
                state.model, batch, state.precision, ALONE, self.chunk, state.distillation
            )
            state.update(loss)
            self.progress.advance(state.losses[-1], 0.0, len(state.losses))


def free_memory() -> None:
    """Give back the GPU's memory that nothing uses, and forget its peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
