"""BERT as text tower (Devlin et al. 2019), as Chinese-CLIP has it (Yang et al. 2022, section 3.1).

Names and numbers of the weights are BERT's own. Unlike in CLIP's text tower, a token attends to all
tokens of its text, norms come after the residual sum, and the feature is read at the class token,
which is the first. There is no dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attend
from models.config import Config
from models.packing import Layout
from models.transformer import BlockStack, LayerNorm

EPSILON = 1e-12  # of all norms
TOKEN_TYPES = 2  # of which texts have the first; BERT's pre-training gave it to the first sentence


class Bert(nn.Module):
    """The text tower of a Chinese-CLIP, without the projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Ids `[t]` of packed tokens and their positions `[t]` in their texts -> `[n, w]`: the
        output of the pooled tokens."""
        return self.encoder(self.embeddings(ids, positions), layout)

    def initialize(self) -> None:
        """Draw random weights for training from scratch. BERT's own are smaller, so that the class
        token sees little of the text at first: a small model then takes epochs to get started."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


class Embeddings(nn.Module):
    """The normed sum of a token's own embedding, that of its position and that of its type."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.transformer_width
        self.word_embeddings = _table(config.vocab_size, width)
        self.position_embeddings = _table(config.text_positions, width)
        self.token_type_embeddings = _table(TOKEN_TYPES, width)
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions `[t]` -> `[t, w]`."""
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.LayerNorm(x + self.token_type_embeddings.weight[0])


class Encoder(BlockStack):
    """The blocks of BERT."""

    def __init__(self, config: Config):
        super().__init__()
        width, heads = config.transformer_width, config.transformer_heads
        self.layer = nn.ModuleList(
            Block(width, heads, config.transformer_mlp_width)
            for _ in range(config.transformer_layers)
        )

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layer


class Block(nn.Module):
    """Attention and an MLP, each added to its input and then layer-normalised (post-norm, as in
    Vaswani et al. 2017, section 3.1)."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(width, heads), "output": AddAndNorm(width, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_width)})
        self.output = AddAndNorm(mlp_width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`: the output of every token."""
        return self._after_attention(self.attention["self"](x, layout), x)

    def forward_pooled(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the output of the pooled tokens only."""
        mixed = self.attention["self"].forward_pooled(x, layout)
        return self._after_attention(mixed, layout.pool(x))

    def _after_attention(self, mixed: Tensor, x: Tensor) -> Tensor:
        x = self.attention["output"](mixed, x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) over packed sequences, without
    the output layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`: the mixed values for every token."""
        mixed = self._mixed(layout.grid(self.query(x)), x, layout)
        return layout.packed(mixed)

    def forward_pooled(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the mixed values for the pooled tokens only."""
        return self._mixed(self.query(layout.pool(x))[:, None], x, layout).squeeze(1)

    def _mixed(self, query: Tensor, x: Tensor, layout: Layout) -> Tensor:
        """Queries `[n, q, w]`, tokens `[t, w]` -> `[n, q, w]`."""
        grids = (query, layout.grid(self.key(x)), layout.grid(self.value(x)))
        query, key, value = (g.unflatten(-1, (self.heads, -1)).transpose(1, 2) for g in grids)
        mixed = attend(query, key, value, layout.mask())
        return mixed.transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """A linear layer whose output is added to the residual stream, which is then normed."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`[t, in_width]` and `[t, width]` -> `[t, width]`."""
        return self.LayerNorm(self.dense(x) + residual)


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding without initial values: drawing them on the meta device imports torch's
    compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
