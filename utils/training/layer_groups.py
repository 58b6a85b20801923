"""Which tower and which layer a parameter belongs to; freezing a tower, all of it or in part."""

import re

import torch
from torch import Tensor, nn

from models.clip import CLIP
from models.errors import InputError
from models.lora import add_lora
from models.open_clip_model import OpenClipModel
from utils.data.image_files import refuse_unreadable
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.retrieval.encode import encode_images, encode_texts

TOWERS = ("image", "text")

# Of our towers and open_clip's own, of timm's and of transformers'. The stages of a tower without
# equal blocks are its layers.
LAYER = re.compile(
    r"(?:transformer\.resblocks\.|visual\.layer|bert\.encoder\.layer\."
    r"|visual\.trunk\.(?:blocks|stages|layers)[._]"
    r"|text\.transformer\.(?:encoder\.)?(?:layers?|block)\.)(\d+)\."
)
HEAD = re.compile(
    r"(?:(?:visual\.|text\.)?(?:ln_post|ln_final|proj|text_projection|attnpool)"
    r"|logit_scale|logit_bias|visual\.head"
    r"|visual\.trunk\.(?:norm|fc_norm|attn_pool|head|final_conv|conv_head|bn2)"
    r"|text\.transformer\.(?:final_layer_norm|layer_norm|pooler))(?:\.|$)"
)
# What learns though its tower is frozen: the last projections of towers from timm and transformers
# (`CLIP.projections`), and what belongs to no tower.
NEVER_FROZEN = re.compile(r"visual\.head\.(?:proj|mlp)\.|text\.proj\.|logit_")


def distance_from_end(model: CLIP) -> dict[str, int]:
    """The number of layers between each named parameter and the features: 0 for the projection and
    the norm before it (in a ResNet the attention pooling) and the logit scale, 1 for the last block
    (in a ResNet the last stage), and so on; embeddings have the largest."""
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
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return sorted({tower_of(name) for name in names if not name.startswith("logit_")})


def frozen_towers(model: CLIP) -> list[str]:
    """The towers without trainable parameters, but for those `NEVER_FROZEN`."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    learn = {tower_of(name) for name in names if not NEVER_FROZEN.match(name)}
    return [tower for tower in TOWERS if tower not in learn]


def freeze(model: CLIP, tower: str, unlocked: int) -> None:
    """Freeze a tower except for its last `unlocked` blocks and what follows them; with 0, all of it
    (Zhai et al. 2022, "LiT"), but not the last projection of a tower from timm or transformers."""
    distances = distance_from_end(model)
    own = [n for n in distances if tower_of(n) == tower and not NEVER_FROZEN.match(n)]
    blocks = max(distances[name] for name in own) - 1
    if unlocked > blocks:
        raise InputError(
            f"--lock_{tower} {unlocked}: this tower has {blocks} blocks; to train all, leave it out"
        )
    for name in own:
        if unlocked == 0 or distances[name] > unlocked:
            model.get_parameter(name).requires_grad_(False)


def freeze_and_adapt(
    model: CLIP, lock_image: int | None, lock_text: int | None, lora: int | None
) -> None:
    """`freeze` the towers with a number of blocks, and add low-rank changes of rank `lora`, unless
    the model of a resumed run has them. Raises `InputError` if nothing is left to train."""
    for tower, unlocked in (("image", lock_image), ("text", lock_text)):
        if unlocked is not None:
            freeze(model, tower, unlocked)
    if not trainable_towers(model):
        raise InputError("--lock_image and --lock_text together leave nothing to train: unlock "
                         "some blocks of one, such as --lock_text 2")  # fmt: skip
    if lora and not any(".lora." in name for name, _ in model.named_parameters()):
        add_lora(model, lora)


def train_mode(model: nn.Module, is_from_scratch: bool = False) -> None:
    """Put the model into training mode, but batch norms into evaluation mode, so that they keep the
    statistics of the starting model; from scratch only frozen ones."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(is_from_scratch and module.weight.requires_grad)


def whole_batch_norms(
    model: CLIP, device: torch.device, processes: Processes, grad_cache: int | None
) -> CLIP:
    """The model with batch norms over the batch of all processes; else `InputError`."""
    is_whole = processes.size == 1 and not grad_cache
    if is_whole or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if grad_cache:
        raise InputError("--grad_cache: a ResNet's batch norm mixes the images of a batch, so that "
                         "chunks would change it; take a ViT, or --grad_checkpointing")  # fmt: skip
    if isinstance(model, OpenClipModel) or device.type != "cuda":
        # In timm's, torch would drop the activations; on CPUs it has none.
        raise InputError("the batch norms of this image tower work in one process alone (a "
                         "ResNet's on GPUs in several): start one, or take a ViT")  # fmt: skip
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@explained()
def cache_features(
    model: CLIP, loader: TrainLoader, val_set: Flickr8kDataset, precision: Precision
) -> dict[str, Tensor]:
    """Compute the features of frozen towers once, normalised, float32; of a tower whose last
    projection learns, the inputs of that. `loader` takes those of the training data; those of
    `val_set`, by tower, are returned. `InputError` for unreadable training images."""
    of_val: dict[str, Tensor] = {}
    processes = loader.processes
    for tower in frozen_towers(model):
        if tower == "image" and processes.is_rank_0:
            refuse_unreadable([loader.dataset], loader.num_workers)
        for dataset, features in ((loader.dataset, loader.features), (val_set, of_val)):
            sizes = loader.batch_size, loader.num_workers
            with precision.autocast():
                if tower == "image":
                    features[tower] = encode_images(model, dataset, *sizes, processes, cache=True)
                else:
                    features[tower] = encode_texts(model, dataset.tokens, processes, cache=True)
        loader.features[tower] = loader.features[tower].cpu()
    return of_val
