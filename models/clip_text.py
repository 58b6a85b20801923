"""CLIP's own text tower (Radford et al. 2021, section 2.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import VOCABULARY, Config
from models.packing import Layout
from models.tokens import clip_tokenizer
from models.transformer import BlockStack, LayerNorm, Transformer, embedding


class TextTower:
    """A causal transformer, read at the last token. Each of `TEXT_TOWERS` has what this one has.
    The modules are attributes of the model, as the published names of weights have it."""

    causal = True  # a token attends to none after it, and the feature is read at the last
    language = "English"  # of the texts in the training of the published models
    vocabulary = VOCABULARY  # tokens that the tokenizer knows
    transformers_model = "CLIP"  # start of the names of its classes in transformers
    transformers_tokenizer = "CLIPTokenizer"
    templates = "photo"  # set in utils/data/templates.py, default for zero-shot classification
    tokenizer = staticmethod(clip_tokenizer)

    def add_to(self, model: nn.Module, config: Config) -> None:
        """Create the modules, without initial values."""
        width = config.transformer_width
        model.transformer = Transformer(
            width,
            config.transformer_layers,
            config.transformer_heads,
            config.transformer_mlp_width,
            config.activation,
        )
        model.token_embedding = embedding(config.vocab_size, width)
        model.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        model.ln_final = LayerNorm(width)

    def initialize(self, model: nn.Module) -> None:
        model.transformer.initialize()
        nn.init.normal_(model.token_embedding.weight, std=0.02)
        nn.init.normal_(model.positional_embedding, std=0.01)

    def blocks(self, model: nn.Module) -> BlockStack:
        """The transformer, the part worth compiling."""
        return model.transformer

    def last_tokens(self, tokens: Tensor) -> Tensor:
        """The position `[n]` of the end-of-text token, the largest id, in each row `[n, l]`."""
        return tokens.argmax(dim=1)

    def encode(self, model: nn.Module, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Packed token ids `[t]` and their positions `[t]` in their texts -> `[n, w]`."""
        # F.embedding and not indexing: the gradient of indexing is summed in an order that differs
        # from run to run.
        x = model.token_embedding(ids) + F.embedding(positions, model.positional_embedding)
        return model.ln_final(model.transformer(x, layout))
