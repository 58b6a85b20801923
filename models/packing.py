"""Packed sequences: the sequences of a batch end to end in one tensor `[t, w]`, where t is the
number of tokens without padding and w is the width.

Linear layers and norms thus do no work on padding. Only attention needs a grid, with one row a
sequence. `index_select` picks rows, because its gradient needs no sorting on a GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.device import upload

# A grid's length is a multiple of this number. The attention of CUDA is faster at such lengths, and
# fewer lengths occur.
LENGTH_MULTIPLE = {"cuda": 8}


class Layout(NamedTuple):
    """How n sequences are packed, and which token of each is pooled. The grid has n rows of
    `length` cells, numbered row by row."""

    length: int  # at least the number of tokens in the longest sequence
    pooled: Tensor  # [n] row of the token at which the feature of each sequence is read
    cells: Tensor | None = None  # [t] the cell of each token; None if all cells hold tokens
    causal: bool = False  # a token attends only to itself and to the tokens before it
    filled: Tensor | None = None  # bool [n, length]: which cells hold tokens; None: all, or causal

    def grid(self, x: Tensor) -> Tensor:
        """`[t, c]` -> `[n, length, c]`, with zeros after the end of a sequence."""
        n, channels = self.pooled.shape[0], x.shape[-1]
        if self.cells is not None:
            x = x.new_zeros(n * self.length, channels).index_copy_(0, self.cells, x)
        return x.view(n, self.length, channels)

    def mask(self) -> Tensor | None:
        """bool `[n, 1, 1, length]`: the cells that a pooled token attends to (those of tokens and,
        if causal, not after it); None for all cells."""
        if self.filled is not None:
            return self.filled[:, None, None]
        if self.cells is None:
            return None
        cells = self.pool(self.cells)
        positions = torch.arange(self.length, device=cells.device)
        return (positions <= cells[:, None] % self.length)[:, None, None]

    def packed(self, x: Tensor) -> Tensor:
        """`[n, length, c]` -> `[t, c]`, the inverse of `grid`."""
        x = x.flatten(0, 1)
        return x if self.cells is None else x.index_select(0, self.cells)

    def pool(self, x: Tensor) -> Tensor:
        """`[t, c]` -> `[n, c]`: the pooled tokens."""
        return x.index_select(0, self.pooled)


def pack(
    tokens: Tensor, ends: Tensor, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor, Layout]:
    """Rows of token ids `[n, l]` and the position `[n]` of the last token in each, both on the CPU
    -> on the device the ids `[t]` of the tokens up to those, their positions `[t]` in their texts,
    and the layout. It is pooled at the last token if `causal`, else at the first."""
    multiple = LENGTH_MULTIPLE.get(device.type, 1)
    length = (int(ends.max()) // multiple + 1) * multiple
    filled = torch.arange(length) <= ends[:, None]
    rows, positions = filled.nonzero(as_tuple=True)
    pooled = (ends + 1).cumsum(0) - 1
    if not causal:
        pooled = pooled - ends
    ids, positions, cells, pooled = (
        upload(t, device)
        for t in (tokens[rows, positions], positions, rows * length + positions, pooled)
    )
    filled = None if causal else upload(filled, device)
    return ids, positions, Layout(length, pooled, cells, causal, filled)
