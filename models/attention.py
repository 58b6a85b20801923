"""Attention, by the fastest implementation for a device and a type."""

import torch
import torch.nn.functional as F
from torch import Tensor

# On recent GPUs torch prefers cuDNN's attention, which plans anew for every length of texts.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    qkv: tuple[Tensor, Tensor, Tensor], heads: int, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Queries `[n, q, w]`, keys and values `[n, length, w]` -> the mixed values for each query,
    `[n, q, w]`, by `heads` heads (Vaswani et al. 2017, section 3.2). The bool `[n, 1, 1, length]`
    `mask` is True for the keys attended to. If `causal`, a query attends to no key after it."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv)
    if query.dtype is torch.bfloat16 and query.device.type == "cpu":
        # torch's own function takes four times as long for it, backward pass included.
        mixed = _attend_in_products(query, key, value, mask, causal)
    else:
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def _attend_in_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """`F.scaled_dot_product_attention` by two batched matrix products."""
    bias = query.new_zeros(1, 1, 1)
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        bias = bias.expand(-1, query.shape[1], -1, -1).flatten(0, 1)
    elif causal:
        length = query.shape[2]
        bias = query.new_full((length, length), -torch.inf).triu(1)
    queries, keys, values = (x.flatten(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view_as(query)
