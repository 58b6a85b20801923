"""CLIP: an image tower and a text tower with features in one space (Radford et al. 2021)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import Bert
from models.config import Config
from models.errors import InputError
from models.packing import Layout, last_tokens, pack
from models.preprocess import Preprocess
from models.resnet import ModifiedResNet
from models.tokens import Tokenizer, chinese_tokenizer, clip_tokenizer, token_rows
from models.transformer import BlockStack, LayerNorm, Transformer
from models.vit import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)  # of the parameter, whose exponential multiplies similarities


class CLIP(nn.Module):
    """The image tower `visual`, the text tower, and the scale of their similarities.

    The parameters are left uninitialised: call `initialize`, or use `build_model` to fill in
    weights.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = (VisionTransformer if config.is_vit else ModifiedResNet)(config)
        width = config.transformer_width
        if config.has_bert:
            self.bert = Bert(config)
        else:
            self._add_text_tower(config)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def _add_text_tower(self, config: Config) -> None:
        """CLIP's own. Its modules are the model's, since so are the published names of weights."""
        width = config.transformer_width
        self.transformer = Transformer(
            width,
            config.transformer_layers,
            config.transformer_heads,
            config.transformer_mlp_width,
            config.activation,
        )
        # nn.Embedding(...) would draw initial values, which on the meta device imports torch's
        # compiler.
        table = torch.empty(config.vocab_size, width)
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.ln_final = LayerNorm(width)

    @property
    def embed_dim(self) -> int:
        """The number of channels d of a feature, the same in both towers."""
        return self.config.embed_dim

    @property
    def context_length(self) -> int:
        """The number of tokens that the text tower reads at most."""
        return self.config.context_length

    @property
    def preprocess(self) -> Preprocess:
        """What turns an image into an input of this model."""
        c = self.config
        return Preprocess(c.image_resolution, c.mean, c.std, c.interpolation, c.resize_mode)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the text tower was trained with."""
        return chinese_tokenizer() if self.config.has_bert else clip_tokenizer()

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.logit_scale.device

    def tokenize(self, texts: str | list[str], truncate: bool = False) -> Tensor:
        """n texts -> token ids `[n, context_length]` for this model, as `token_rows` makes them."""
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
        `tokens` on the CPU, so that it does not wait for a GPU. Raises `InputError` for rows that
        are too long.
        """
        if tokens.shape[1] > self.context_length:
            raise InputError(
                f"texts of {tokens.shape[1]} tokens; this model reads {self.context_length}"
            )
        features = self._encode_tokens(*pack(tokens, self.config.has_bert, self.device))
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text_grid(self, tokens: Tensor) -> Tensor:
        """Token ids `[n, <=context_length]` on the model's device -> what `encode_text` gives.

        For export to ONNX, which records the operations of one call and repeats them for any
        texts. `encode_text` cannot be recorded, because how many tokens it leaves out, and so the
        shapes of its tensors, depend on the texts. Here none is left out: all rows take as long as
        the longest possible one.
        """
        n, length = tokens.shape
        positions = torch.arange(length, device=tokens.device)
        starts = torch.arange(n, device=tokens.device) * length
        ends = last_tokens(tokens, self.config.has_bert)
        layout = Layout(
            length,
            pooled=starts if self.config.has_bert else starts + ends,
            causal=not self.config.has_bert,
            filled=positions <= ends[:, None],
        )
        return self._encode_tokens(tokens.flatten(), positions.repeat(n), layout)

    def _encode_tokens(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Ids `[t]` of packed tokens and their positions `[t]` in their texts -> `[n, d]`."""
        if self.config.has_bert:
            return self.bert(ids, positions, layout) @ self.text_projection
        # F.embedding and not indexing: the gradient of indexing is summed in an order that differs
        # from run to run.
        x = self.token_embedding(ids) + F.embedding(positions, self.positional_embedding)
        return self.ln_final(self.transformer(x, layout)) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images `[n, 3, r, r]` and token ids `[m, <=context_length]` -> logits.

        `logits_per_image` `[n, m]` are the cosine similarities times `exp(logit_scale)` (Radford et
        al. 2021, figure 3), and `logits_per_text` `[m, n]` is their transpose. Raises `InputError`
        as `encode_image` and `encode_text` do.
        """
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Lower `exp(logit_scale)` to 100 if it is larger (Radford et al. 2021, section 2.5)."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def enable_grad_checkpointing(self) -> None:
        """Save memory in training: transformers do not keep the activations inside their blocks,
        but compute them again during the backward pass (Chen et al. 2016)."""
        for module in self.modules():
            if isinstance(module, BlockStack):
                module.grad_checkpointing = True

    def compile_towers(self) -> None:
        """Compile both towers with `torch.compile`. The text tower is compiled for any number of
        tokens, because that number differs from batch to batch."""
        self.visual.compile()
        (self.bert.encoder if self.config.has_bert else self.transformer).compile(dynamic=True)

    def initialize(self) -> "CLIP":
        """Draw random weights for training from scratch, and return the model."""
        self.visual.initialize()
        if self.config.has_bert:
            self.bert.initialize()
        else:
            self.transformer.initialize()
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        return self
