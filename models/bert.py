"""BERT as the text tower of Chinese-CLIP (Devlin et al. 2019; Yang et al. 2022, section 3.1). The
weights have BERT's names. There is no dropout."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attend
from models.config import CHINESE_VOCABULARY, Config
from models.packing import Layout
from models.tokens import chinese_tokenizer
from models.transformer import BlockStack, LayerNorm, embedding

EPSILON = 1e-12  # of all norms
TOKEN_TYPES = 2  # all texts here have type 0, BERT's first sentence


class TextTower:
    """BERT, `model.bert`: each token attends to all tokens of its text, and the output is read at
    the first, the class token. The methods are those of `models.clip_text.TextTower`."""

    causal = False
    language = "Chinese"
    vocabulary = CHINESE_VOCABULARY
    transformers_model = "ChineseCLIP"
    transformers_tokenizer = "BertTokenizer"
    templates = "cn_photo"
    tokenizer = staticmethod(chinese_tokenizer)

    def add_to(self, model: nn.Module, config: Config) -> None:
        model.bert = Bert(config)

    def initialize(self, model: nn.Module) -> None:
        model.bert.initialize()

    def blocks(self, model: nn.Module) -> BlockStack:
        return model.bert.encoder

    def last_tokens(self, tokens: Tensor) -> Tensor:
        """The position `[n]` of the last id in each row `[n, l]` that is not zero."""
        # Where the count of tokens reaches its highest: argmax gives the first such position.
        return tokens.ne(0).cumsum(dim=1).argmax(dim=1)

    def encode(self, model: nn.Module, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        return model.bert(ids, positions, layout)


class Bert(nn.Module):
    """Embeddings and blocks, without the projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """Ids and positions `[t]` of packed tokens -> the output of the pooled ones, `[n, w]`."""
        return self.encoder(self.embeddings(ids, positions), layout)

    def initialize(self) -> None:
        """Draw random weights for training from scratch, larger than BERT's own: with
        those, the class token of a small model attends to little text in the first epochs."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)


class Embeddings(nn.Module):
    """The normed sum of a token's embedding, position embedding and type embedding."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.transformer_width
        self.word_embeddings = embedding(config.vocab_size, width)
        self.position_embeddings = embedding(config.text_positions, width)
        self.token_type_embeddings = embedding(TOKEN_TYPES, width)
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids and positions `[t]` -> `[t, w]`."""
        x = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.LayerNorm(x + self.token_type_embeddings.weight[0])


class Encoder(BlockStack):
    """The blocks of BERT."""

    def __init__(self, config: Config):
        super().__init__()
        sizes = config.transformer_width, config.transformer_heads, config.transformer_mlp_width
        self.layer = nn.ModuleList(Block(*sizes) for _ in range(config.transformer_layers))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layer


class Block(nn.Module):
    """Attention and an MLP, each followed by the residual sum and a norm (Vaswani et al. 2017)."""

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
    """Multi-head self-attention over packed sequences, without the output layer."""

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
        qkv = query, layout.grid(self.key(x)), layout.grid(self.value(x))
        return attend(qkv, self.heads, layout.mask())


class AddAndNorm(nn.Module):
    """A linear layer, the residual sum, and a norm."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = LayerNorm(width, EPSILON)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """`[t, in_width]` and `[t, width]` -> `[t, width]`."""
        return self.LayerNorm(self.dense(x) + residual)
