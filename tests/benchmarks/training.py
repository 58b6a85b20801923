"""Training steps of ours and of the peers, on the same weights and batches, and what they cost."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.nn.functional as F
from measure import check, relative_differences
from open_clip.loss import ClipLoss
from peers import chinese_clip_model, cn_clip_model, to_transformers
from torch import Tensor, nn

from models.clip import CLIP, MAX_LOGIT_SCALE
from models.clip_utils import build_model
from models.config import Config
from models.errors import InputError
from models.preprocess import Preprocess, open_image
from models.weights import transformers as format_of_transformers
from models.weights.registry import CONFIGS
from utils import Flickr8kDataset, contrastive_loss
from utils.flickr8k_dataloader import Batch
from utils.machine.precision import Precision
from utils.machine.processes import ALONE
from utils.training.gradients import accumulate_gradients
from utils.training.optimizer import parameter_groups

VIT_MODELS = [
    name for name, config in CONFIGS.items() if config.is_vit and config.text_tower == "clip"
]
CHINESE = {  # the second is of the size of OFA-Sys/chinese-clip-vit-base-patch16
    "cn-demo": CONFIGS["cn-demo"],
    "chinese-clip": replace(
        CONFIGS["ViT-B/16"], text_tower="bert", transformer_width=768, transformer_mlp_width=3072,
        transformer_heads=12, context_length=52, text_positions=512, vocab_size=21128,
    ),
}  # fmt: skip
TOLERANCE = 1e-4  # relative, of losses and gradients
STEP_TOLERANCE = {False: 1e-5, True: 1e-2}  # of a step's loss, without and with bfloat16
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def our_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    return contrastive_loss(image_features, text_features, model.logit_scale)


def chinese_models(config: Config) -> tuple[CLIP, nn.Module, nn.Module]:
    """Ours, cn_clip's and transformers', with the same random weights and without dropout."""
    hugging_face = chinese_clip_model(config)
    weights = {key: tensor.clone() for key, tensor in hugging_face.state_dict().items()}
    ours = build_model(format_of_transformers.to_ours(weights), config)
    return ours, cn_clip_model(config, ours.state_dict()), hugging_face


def cn_clip_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """As cn_clip trains: every text padded to 52 tokens."""
    return ClipLoss()(*model(images, tokens.to(images.device).long()))


def chinese_transformers_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """As transformers' processor prepares a batch: padded to the longest text, with a mask."""
    tokens = tokens[:, : int(lengths_of_chinese(tokens).max())].to(images.device)
    return model(
        input_ids=tokens.long(),
        attention_mask=tokens.ne(0).long(),
        pixel_values=images,
        return_loss=True,
    ).loss


def open_clip_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """As open_clip trains: every text padded to 77 tokens."""
    image_features, text_features, scale = model(images, tokens.to(images.device).long())[:3]
    return ClipLoss()(image_features, text_features, scale)


def open_clip_cut_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """open_clip, padding no further than the batch's longest text."""
    image_features = model.encode_image(images, normalize=True)
    text_features = F.normalize(open_clip_cut_text(model, tokens), dim=-1)
    return ClipLoss()(image_features, text_features, model.logit_scale.exp())


def open_clip_cut_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Features `[n, d]` from open_clip's text tower, which itself takes 77 tokens and no fewer."""
    length = longest(tokens)
    tokens = tokens[:, :length].to(model.text_projection.device).long()
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)] @ model.text_projection


def transformers_loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    """As transformers' processor prepares a batch: padded to the longest text, with a mask."""
    tokens = tokens[:, : longest(tokens)]
    mask = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=1)[:, None]
    return model(
        input_ids=tokens.to(images.device).long(),
        attention_mask=mask.to(images.device).long(),
        pixel_values=images,
        return_loss=True,
    ).loss


def longest(tokens: Tensor) -> int:
    """Tokens in the longest text."""
    return int(tokens.argmax(dim=1).max()) + 1


def lengths_of_chinese(tokens: Tensor) -> Tensor:
    """Tokens in each text, `[n]`. No text has the id 0, which fills up rows."""
    return tokens.ne(0).sum(dim=1)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same optimizer for everyone; its rate is so low that the weights stay comparable."""
    return torch.optim.AdamW(parameter_groups(model, momentum=0.9, weight_decay=0.1), lr=1e-7)


def our_step(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    precision: Precision,
) -> float:
    """A step as train.py takes it, from the bytes of the images to the update; the loss before."""
    loss = accumulate_gradients(model, batch, precision, ALONE)
    precision.update(model, optimizer, max_norm=1.0)
    return loss.item()


def train(
    model: nn.Module,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    tokens: Tensor,
    autocast: AbstractContextManager,
) -> None:
    """One step: forward, loss, backward, update, the logit scale kept below its limit."""
    with autocast:
        value = loss(model, images, tokens)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def real_batches(
    data: str,
    side: int,
    batch_size: int,
    count: int,
    device: torch.device,
    chinese: CLIP | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` batches of training images, normalised and on the device, and one caption of each, in
    Chinese for a `chinese` model."""
    dataset = Flickr8kDataset(data, side, language="cn" if chinese else "en", model=chinese)
    if len(dataset) < batch_size:
        raise InputError(f"{data} has {len(dataset)} training images, too few for {batch_size}")
    preprocess = Preprocess(side)
    for first in range(0, count * batch_size, batch_size):
        rows = [i % len(dataset) for i in range(first, first + batch_size)]
        pictures = (open_image(dataset.image[row]) for row in rows)
        images = torch.stack([preprocess.resize_and_crop(picture) for picture in pictures])
        captions = [dataset.own_captions[row] for row in rows]
        chosen = [indices[row % len(indices)] for row, indices in zip(rows, captions, strict=True)]
        yield preprocess.normalize(images.to(device)), dataset.tokens[chosen]


def check_agreement(
    ours: nn.Module, peers: dict[str, tuple[nn.Module, Loss]], images: Tensor, tokens: Tensor
) -> None:
    """Check that the loss and all gradients of ours are each peer's within 1e-4, in float32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        loss, gradients = _loss_and_gradients(ours, our_loss, images, tokens)
        for name, (model, peer_loss) in peers.items():
            their_loss, theirs = _loss_and_gradients(model, peer_loss, images, tokens)
            rename = (
                format_of_transformers.to_transformers
                if ours.config.text_tower == "bert"
                else to_transformers
            )
            mine = gradients if gradients.keys() == theirs.keys() else rename(gradients)
            check(f"ours and {name}: losses", [abs(loss / their_loss - 1)], TOLERANCE)
            check(f"ours and {name}: gradients", relative_differences(mine, theirs), TOLERANCE)


def _loss_and_gradients(
    model: nn.Module, loss: Loss, images: Tensor, tokens: Tensor
) -> tuple[float, dict[str, Tensor]]:
    value = loss(model, images, tokens)
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return value.item(), gradients


def step_flops(config: Config, tokens: Tensor) -> float:
    """Floating-point operations that a training step cannot do without.

    Counted from shapes, 2 m n k a matrix product, backward twice the forward: real tokens only,
    causal attention as far as it looks, and in a tower's last block what the pooled tokens depend
    on. `config` describes the model, `tokens` `[n, context_length]` the texts. The same number
    stands for everyone: padding counts as time and not as work.
    """
    n, d = len(tokens), config.embed_dim
    width, patch = config.vision_width, config.vision_patch_size
    patches = (config.image_resolution // patch) ** 2
    lengths = torch.full((n,), patches + 1)
    embedding = 2 * n * patches * 3 * patch**2 * width  # its input needs no gradient: backward once
    images = _tower_flops(lengths, lengths**2, width, config.vision_layers)

    is_chinese = config.text_tower == "bert"
    lengths = lengths_of_chinese(tokens) if is_chinese else tokens.argmax(dim=1) + 1
    text_width = config.transformer_width
    seen = lengths**2 if is_chinese else lengths * (lengths + 1) // 2
    texts = _tower_flops(lengths, seen, text_width, config.transformer_layers)
    joint = 2 * n * d * (width + text_width) + 2 * n * n * d
    return 2 * embedding + 3 * (images + texts + joint)


def _tower_flops(lengths: Tensor, pairs: Tensor, width: int, layers: int) -> int:
    """The forward pass of a tower over sequences of `lengths` `[n]`, in each of which as many
    `pairs` `[n]` of tokens attend to each other."""
    n, total = len(lengths), int(lengths.sum())
    products = 12 * total * width**2  # query, key, value 3; output 1; MLP 4 + 4
    attention = 2 * int(pairs.sum()) * width  # scores, and sums of the values
    last = (2 * total + 10 * n) * width**2 + 2 * total * width
    return 2 * ((layers - 1) * (products + attention) + last)
