"""CLIP: an image tower and a text tower with features in one space (Radford et al. 2021)."""

import math
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip_text import TextTower
from models.config import TEXT_TOWERS, Config
from models.errors import InputError
from models.packing import Layout, pack
from models.preprocess import Preprocess
from models.resnet import ModifiedResNet
from models.tokens import Tokenizer, token_rows
from models.transformer import BlockStack
from models.vit import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)  # of the parameter, whose exponential multiplies similarities


def text_tower(config: Config) -> TextTower:
    """The kind of a model's text tower."""
    return import_module(TEXT_TOWERS[config.text_tower]).TextTower()


def compile_for_training(tower: nn.Module, dynamic: bool | None = None) -> None:
    """Compile `tower` with `torch.compile` for training mode. Evaluation, whose batches have other
    sizes, would make it compile anew, or once for all sizes, which is slower."""
    as_it_is, compiled = tower.forward, torch.compile(tower.forward, dynamic=dynamic)
    tower.forward = lambda *inputs: (compiled if tower.training else as_it_is)(*inputs)


class CLIP(nn.Module):
    """The image tower `visual`, the text tower, and the logit scale. The parameters have no initial
    values: call `initialize`, or use `build_model` with weights."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = (VisionTransformer if config.is_vit else ModifiedResNet)(config)
        self.text_tower = text_tower(config)
        self.text_tower.add_to(self, config)
        projection = torch.empty(config.transformer_width, config.embed_dim)
        self.text_projection = nn.Parameter(projection)
        self.logit_scale = nn.Parameter(torch.empty(()))
        # Only models that open_clip builds have these: see `OpenClipModel`.
        self.logit_bias: nn.Parameter | None = None
        self.projections: dict[str, nn.Module] = {}

    @property
    def embed_dim(self) -> int:
        """The number d of channels of a feature."""
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        """The largest number of tokens in a text."""
        return self.config.context_length

    @property
    def preprocess(self) -> Preprocess:
        """The preprocessing of images for this model."""
        c = self.config
        return Preprocess(c.image_resolution, c.mean, c.std, c.interpolation, c.resize_mode)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the text tower was trained with."""
        return self.text_tower.tokenizer()

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def tokenize(self, texts: str | list[str], truncate: bool = False) -> Tensor:
        """n texts -> token ids `[n, context_length]` for this model, see `token_rows`."""
        return token_rows(self.tokenizer, texts, self.context_length, truncate)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Preprocessed images `[n, 3, r, r]` -> features `[n, d]`; with `normalize`, in float32 and
        of length 1. Raises `InputError` for images of another shape."""
        side = self.visual.input_resolution
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            given = list(images.shape)
            raise InputError(f"images have shape {given}; this model takes [n, 3, {side}, {side}]")
        features = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids `[n, <=context_length]` of `tokenize` -> features `[n, d]`; with `normalize`,
        in float32 and of length 1.

        Tokens after the end of a text cannot change its feature and are left out, see `pack`. Keep
        `tokens` on the CPU: the shapes depend on them, and it would wait for a GPU. Raises
        `InputError` for rows that are too long.
        """
        if tokens.shape[1] > self.context_length:
            length = tokens.shape[1]
            raise InputError(f"texts of {length} tokens; this model reads {self.context_length}")
        tokens = tokens.cpu()
        ends = self.text_tower.last_tokens(tokens)
        features = self._encode_tokens(*pack(tokens, ends, self.text_tower.causal, self.device))
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text_grid(self, tokens: Tensor) -> Tensor:
        """`encode_text` for token ids on the model's device, without packing, after which shapes
        depend on the texts: ONNX export cannot record that."""
        n, length = tokens.shape
        positions = torch.arange(length, device=tokens.device)
        starts = torch.arange(n, device=tokens.device) * length
        ends, causal = self.text_tower.last_tokens(tokens), self.text_tower.causal
        pooled, filled = starts + ends if causal else starts, positions <= ends[:, None]
        layout = Layout(length, pooled, causal=causal, filled=filled)
        return self._encode_tokens(tokens.flatten(), positions.repeat(n), layout)

    def _encode_tokens(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Ids `[t]` of packed tokens and their positions `[t]` in their texts -> `[n, d]`."""
        return self.text_tower.encode(self, ids, positions, layout) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[n, 3, r, r]` and token ids `[m, <=context_length]` -> logits: `logits_per_image`
        `[n, m]`, the cosine similarities times `exp(logit_scale)` (Radford et al. 2021, figure 3),
        plus the `logit_bias` if there is one, and their transpose `logits_per_text` `[m, n]`."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        return logits_per_image, logits_per_image.T

    def probabilities(self, similarities: Tensor) -> Tensor:
        """Cosine similarities of images and labels, `[..., labels]` -> probabilities: the softmax
        over the labels; with a `logit_bias` each label's own sigmoid (Zhai et al. 2023), so that
        all may be low."""
        logits = self.logit_scale.exp() * similarities
        if self.logit_bias is None:
            return logits.softmax(dim=-1)
        return (logits + self.logit_bias).sigmoid()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Lower `exp(logit_scale)` to 100 if it is larger (Radford et al. 2021, section 2.5). A
        model with a `logit_bias` has no such limit: published SigLIPs are above it."""
        if self.logit_bias is None:
            self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def enable_grad_checkpointing(self) -> None:
        """Recompute activations of transformers in the backward pass (Chen et al. 2016)."""
        for module in self.modules():
            if isinstance(module, BlockStack):
                module.grad_checkpointing = True

    def compile_towers(self) -> None:
        """Compile both towers for training mode, for each size of batch, any number of tokens."""
        compile_for_training(self.visual, dynamic=False)
        compile_for_training(self.text_tower.blocks(self), dynamic=True)

    def initialize(self) -> "CLIP":
        """Draw random weights for training from scratch, and return the model."""
        self.visual.initialize()
        self.text_tower.initialize(self)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        return self
