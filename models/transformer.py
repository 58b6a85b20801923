"""The transformer shared by the vision and the text tower.

Sequences lie end to end in one `[t, w]` tensor, t being the number of real tokens in the batch:
linear layers and norms never touch padding. Only attention sees them as a grid, one row each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD_WIDTH = 64  # of every attention head in the published models


class Layout(NamedTuple):
    """How n sequences lie in a `[t, w]` tensor, and which token of each is read in the end."""

    length: int  # tokens in the longest sequence
    read: Tensor  # [n] row of the token whose feature stands for its sequence
    cells: Tensor | None = None  # [t] cell of each token in the grid; None: all equally long
    causal: bool = False  # a token attends to itself and to those before it

    def grid(self, x: Tensor) -> Tensor:
        """`[t, c]` -> `[n, length, c]`, zeros where a sequence has ended."""
        n, channels = len(self.read), x.shape[-1]
        if self.cells is not None:
            x = x.new_zeros(n * self.length, channels).index_copy(0, self.cells, x)
        return x.view(n, self.length, channels)

    def mask(self) -> Tensor | None:
        """bool `[n, 1, 1, length]`: which cells of the grid hold a token; None: all do."""
        if self.cells is None:
            return None
        mask = torch.zeros(len(self.read) * self.length, dtype=torch.bool, device=self.cells.device)
        return mask.index_fill(0, self.cells, True).view(len(self.read), 1, 1, self.length)

    def packed(self, x: Tensor) -> Tensor:
        """`[n, length, c]` -> `[t, c]`, the inverse of `grid`."""
        x = x.flatten(0, 1)
        return x if self.cells is None else x[self.cells]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU that the published weights were trained with
    (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class MultiheadAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) over packed sequences."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`."""
        # With causal attention a real token never sees the zeros after the end of its sequence.
        qkv = layout.grid(F.linear(x, self.in_proj_weight, self.in_proj_bias))
        query, key, value = self._heads(qkv, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=layout.causal)
        return self.out_proj(layout.packed(mixed.transpose(1, 2).flatten(2)))

    def read(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the same at the tokens that are read, which see all of theirs."""
        width = x.shape[1]
        query_weight, weight = self.in_proj_weight.split([width, 2 * width])
        query_bias, bias = self.in_proj_bias.split([width, 2 * width])
        (query,) = self._heads(F.linear(x[layout.read], query_weight, query_bias)[:, None], 1)
        key, value = self._heads(layout.grid(F.linear(x, weight, bias)), 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.mask())
        return self.out_proj(mixed.flatten(1))

    def _heads(self, x: Tensor, parts: int) -> Tensor:
        """`[n, length, parts * w]` -> `[parts, n, heads, length, w / heads]`."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`."""
        x = x + self.attn(self.ln_1(x), layout)
        return x + self.mlp(self.ln_2(x))

    def read(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the same at the tokens that are read."""
        x = x[layout.read] + self.attn.read(self.ln_1(x), layout)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, read at one token of each sequence: the last block works on no other."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.grad_checkpointing = False  # keep only the blocks' inputs (Chen et al. 2016)
        self.resblocks = nn.Sequential(
            *(ResidualAttentionBlock(width, heads) for _ in range(layers))
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`, the rows `layout.read`."""
        *blocks, last = self.resblocks
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
        return last.read(x, layout)

    def initialize(self) -> None:
        """Random weights as for GPT-2 (Radford et al. 2019): what joins the residual stream shrinks
        with depth."""
        width = self.resblocks[0].ln_1.normalized_shape[0]
        joining = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.normal_(block.attn.out_proj.weight, std=joining)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=joining)
