"""Which tower and which layer a parameter belongs to; locking a tower, all of it or in part."""

import argparse
import re

import torch
from torch import Tensor, nn

from models.clip import CLIP
from models.errors import InputError
from models.lora import add_lora
from utils.data.image_files import refuse_unreadable
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.retrieval.encode import encode_images, encode_texts

TOWERS = ("image", "text")

LAYER = re.compile(r"(?:transformer\.resblocks\.|visual\.layer|bert\.encoder\.layer\.)(\d+)\.")
HEAD = re.compile(
    r"(?:visual\.)?(?:ln_post|ln_final|proj|text_projection|attnpool|logit_scale)(?:\.|$)"
)


def distance_from_end(model: CLIP) -> dict[str, int]:
    """How many layers lie between each named parameter and the features.

    0: the projection and the norm before it (in a ResNet the attention pooling), and the logit
    scale; 1: the last block (in a ResNet the last stage); and so on. What comes before the first
    block, such as embeddings, has the largest number.
    """
    blocks: dict[str, set[int]] = {"image": set(), "text": set()}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        if found := LAYER.search(name):
            blocks[tower_of(name)].add(int(found[1]))
    distances = {}
    for name in names:
        numbers, own = blocks[tower_of(name)], LAYER.search(name)
        if own:
            distances[name] = max(numbers) - int(own[1]) + 1
        elif HEAD.match(name):
            distances[name] = 0
        else:
            distances[name] = len(numbers) + 1
    return distances


def tower_of(name: str) -> str:
    """The tower that a parameter is part of, `"image"` or `"text"`."""
    return "image" if name.startswith("visual.") else "text"


def trainable_towers(model: CLIP) -> list[str]:
    """The towers in which some parameter learns."""
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    return sorted({tower_of(name) for name in learned if name != "logit_scale"})


def lock(model: CLIP, tower: str, unlocked: int) -> None:
    """Exclude a tower, `"image"` or `"text"`, from training, except for its last `unlocked` blocks
    and what follows them; with 0, all of it is excluded (Zhai et al. 2022, "LiT")."""
    distances = distance_from_end(model)
    own = [name for name in distances if tower_of(name) == tower and name != "logit_scale"]
    blocks = max(distances[name] for name in own) - 1
    if unlocked > blocks:
        raise InputError(
            f"--lock_{tower} {unlocked}: this tower has {blocks} blocks; leave --lock_{tower} out "
            "to train all of it"
        )
    for name in own:
        if unlocked == 0 or distances[name] > unlocked:
            model.get_parameter(name).requires_grad_(False)


def trainable(
    model: CLIP, args: argparse.Namespace, device: torch.device, processes: Processes
) -> CLIP:
    """The model as it is trained: with locked towers, with low-rank changes, and with batch norms
    over the whole batch. Raises `InputError` for arguments that this model cannot have."""
    freeze_and_adapt(model, args.lock_image, args.lock_text, args.lora)
    if processes.size > 1 or args.grad_cache:
        return whole_batch_norms(model, device, args.grad_cache)
    return model


def freeze_and_adapt(
    model: CLIP, lock_image: int | None, lock_text: int | None, lora: int | None
) -> None:
    """`lock` the towers of which a number of blocks is given, and add changes of rank `lora`, if it
    is given and the model, that of a run that goes on, does not have them."""
    for tower, unlocked in (("image", lock_image), ("text", lock_text)):
        if unlocked is not None:
            lock(model, tower, unlocked)
    if lora and not any(".lora." in name for name, _ in model.named_parameters()):
        add_lora(model, lora)


def train_mode(model: nn.Module) -> None:
    """Put the model into training mode, but locked batch norms into evaluation mode, so that they
    keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()


def whole_batch_norms(model: CLIP, device: torch.device, grad_cache: int | None) -> CLIP:
    """The model with batch norms over the whole batch, of which each process has a part. Raises
    `InputError` where there is no such batch norm: for chunks of a batch, and on CPUs."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if grad_cache:
        raise InputError("--grad_cache: a ResNet's batch norm mixes the images of a batch, so that "
                         "chunks would change it; take a ViT, or --grad_checkpointing")  # fmt: skip
    if device.type != "cuda":
        raise InputError("a ResNet's batch norm works across processes on GPUs alone: train it "
                         "with one process, or take a ViT")  # fmt: skip
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@explained()
def cache_features(
    args: argparse.Namespace,
    model: CLIP,
    loader: TrainLoader,
    val_set: Flickr8kDataset,
    precision: Precision,
) -> dict[str, Tensor]:
    """With --cache_features, give `loader` the features of all its images or captions by the tower
    that does not learn, in the place of these, and return those of `val_set`, by tower, as
    `encode_set` takes them. They are normalised, float32.

    The images have to be the same in every epoch. Raises `InputError` with a list of the training
    images that cannot be read: in the middle of the set none can take another's place.
    """
    of_val: dict[str, Tensor] = {}
    if not args.cache_features:
        return of_val
    processes, learning = loader.processes, trainable_towers(model)
    for tower in (tower for tower in TOWERS if tower not in learning):
        if tower == "image" and processes.is_rank_0:
            refuse_unreadable([loader.dataset], loader.num_workers)
        for dataset, features in ((loader.dataset, loader.features), (val_set, of_val)):
            sizes = loader.batch_size, loader.num_workers
            with precision.autocast():
                if tower == "image":
                    features[tower] = encode_images(model, dataset, *sizes, processes)
                else:
                    features[tower] = encode_texts(model, dataset.tokens, processes=processes)
        loader.features[tower] = loader.features[tower].cpu()
    return of_val
