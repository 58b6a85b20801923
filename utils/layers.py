"""Which tower and which layer a parameter belongs to: what locking and layer decay go by."""

import re

import torch
from torch import nn

from models.clip import CLIP
from models.errors import InputError

LAYER = re.compile(r"(?:transformer\.resblocks\.|visual\.layer)(\d+)\.")
HEAD = re.compile(r"(?:visual\.)?(?:ln_post|ln_final|proj|text_projection|attnpool)(?:\.|$)")


def distance_from_end(model: CLIP) -> dict[str, int]:
    """How many layers stand between each named parameter and the features: 0 for the projection
    and the norm before it (a ResNet's attention pooling), 1 for the last block (a ResNet's last
    stage), and so on; most for what comes before the first block. The logit scale: 0."""
    names = [name for name, _ in model.named_parameters()]
    depths = {}
    for name in names:
        tower = "visual." if name.startswith("visual.") else ""
        numbers = [
            int(found[1])
            for other in names
            if other.startswith("visual.") == bool(tower) and (found := LAYER.search(other))
        ]
        own = LAYER.search(name)
        if HEAD.match(name) or name == "logit_scale":
            depths[name] = 0
        elif own:
            depths[name] = max(numbers) - int(own[1]) + 1
        else:
            depths[name] = max(numbers) - min(numbers) + 2
    return depths


def lock(model: CLIP, tower: str, unlocked: int) -> None:
    """Keep a tower, `"image"` or `"text"`, from being trained, but for its last `unlocked` blocks
    and what comes after them; with 0 all of it (Zhai et al. 2022, "LiT")."""
    distances = distance_from_end(model)
    blocks = max(d for name, d in distances.items() if in_tower(name, tower)) - 1
    if unlocked > blocks:
        raise InputError(
            f"--lock_{tower} {unlocked}: this tower has {blocks} blocks; leave --lock_{tower} out "
            "to train all of it"
        )
    for name, parameter in model.named_parameters():
        if in_tower(name, tower) and (unlocked == 0 or distances[name] > unlocked):
            parameter.requires_grad_(False)


def in_tower(name: str, tower: str) -> bool:
    """Whether the parameter of that name is part of the tower, `"image"` or `"text"`."""
    return name != "logit_scale" and name.startswith("visual.") == (tower == "image")


def train_mode(model: nn.Module) -> None:
    """Training mode; batch norms that are locked keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()


def whole_batch_norms(model: CLIP, device: torch.device, grad_cache: int | None) -> CLIP:
    """The model with batch norms that see the whole batch where several processes share it. Raises
    `InputError` where that cannot be had: for chunks of a batch, and on CPUs."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if grad_cache:
        raise InputError("--grad_cache: a ResNet's batch norm mixes the images of a batch, so that "
                         "chunks would change it; take a ViT, or --grad_checkpointing")  # fmt: skip
    if device.type != "cuda":
        raise InputError("a ResNet's batch norm works across processes on GPUs alone: train it "
                         "with one process, or take a ViT")  # fmt: skip
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
