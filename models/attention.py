"""Attention, by the fastest implementation for a device and a type."""

import torch
import torch.nn.functional as F
from torch import Tensor

# On recent GPUs torch prefers cuDNN's attention, which plans anew for every length of texts.
torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Queries `[n, heads, q, c]`, keys and values `[n, heads, length, c]` -> the mixed values for
    each query, `[n, heads, q, c]` (Vaswani et al. 2017, section 3.2.1).

    `mask` is bool `[n, 1, 1, length]`, True for the keys attended to. If `causal`, a query attends
    to no key after its own position.
    """
    if query.dtype is not torch.bfloat16 or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    # torch's own function takes four times as long for bfloat16 on a CPU, backward pass included.
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
