"""The transformer that the image tower and the text tower share (Radford et al. 2021, section 2.4).
The sequences of a batch are packed, see `models.packing`: t tokens without padding, of width w."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from models.attention import attend
from models.packing import Layout


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU (Hendrycks & Gimpel 2016, section 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702. Its derivative is that of silu at 1.702 x; autograd alone would also
    multiply and divide by 1.702 in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradient, *ctx.saved_tensors)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016), computed in float32, output in the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """A tensor `[..., w]` -> the same shape and type."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        if x.device.type != "cpu":
            return _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.autocast("cpu", enabled=False):  # the CPU's takes two types
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _LayerNorm(torch.autograd.Function):
    """Of a low-precision tensor with a float32 gain. Autograd alone would keep it in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(x.float(), weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.float(), x.float(), weight.shape, mean, rstd, weight, bias, [True] * 3
        )
        return of_x.to(x.dtype), of_weight, of_bias, None


def embedding(rows: int, width: int) -> nn.Embedding:
    """`nn.Embedding` without initial values, whose drawing would import torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class MultiheadAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) over packed sequences."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.lora: nn.Module | None = None  # the change of in_proj_weight, see models/lora.py

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`: the attention output of every token."""
        # No mask: sequences of different lengths are causal here, so that no token attends to the
        # zeros after the end.
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if self.lora is not None:
            qkv = qkv + self.lora(x)
        mixed = attend(layout.grid(qkv).chunk(3, dim=-1), self.heads, causal=layout.causal)
        return self.out_proj(layout.packed(mixed))

    def forward_pooled(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the attention output of the pooled tokens only."""
        width = x.shape[1]
        query_weight, weight = self.in_proj_weight.split([width, 2 * width])
        query_bias, bias = self.in_proj_bias.split([width, 2 * width])
        query = F.linear(layout.pool(x), query_weight, query_bias)
        key_value = F.linear(x, weight, bias)
        if self.lora is not None:
            query = query + self.lora(layout.pool(x), slice(1))
            key_value = key_value + self.lora(x, slice(1, 3))
        qkv = query[:, None], *layout.grid(key_value).chunk(2, dim=-1)
        return self.out_proj(attend(qkv, self.heads, layout.mask()).squeeze(1))


class ResidualAttentionBlock(nn.Module):
    """Attention and an MLP, each applied to the layer-normalised input and added to the input
    (pre-norm, as in Radford et al. 2019, section 2.3)."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.attn = MultiheadAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[t, w]`: the output of every token."""
        x = x + self.attn(self.ln_1(x), layout)
        return x + self.mlp(self.ln_2(x))

    def forward_pooled(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the output of the pooled tokens only."""
        x = layout.pool(x) + self.attn.forward_pooled(self.ln_1(x), layout)
        return x + self.mlp(self.ln_2(x))


class BlockStack(nn.Module):
    """A stack of `blocks`. The output is that of the pooled token of each sequence, so that the
    last block computes only keys and values of the other tokens. With mixed precision the residual
    stream has the low-precision type in training mode, to save memory; in evaluation mode it is
    float32, for scores closer to those of float32."""

    grad_checkpointing = False  # recompute blocks in the backward pass (Chen et al. 2016)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[t, w]` -> `[n, w]`: the output of the pooled tokens."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and self.training:
            x = x.to(torch.get_autocast_dtype(device))
        *blocks, last = self.blocks
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = recompute(block, x, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, layout)
        return last.forward_pooled(x, layout)


class Transformer(BlockStack):
    """The blocks of CLIP's towers."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        blocks = (
            ResidualAttentionBlock(width, heads, mlp_width, activation) for _ in range(layers)
        )
        self.resblocks = nn.Sequential(*blocks)

    @property
    def blocks(self) -> nn.Sequential:
        return self.resblocks

    def initialize(self) -> None:
        """Draw random weights as for GPT-2 (Radford et al. 2019, section 2.3): layers that add to
        the residual stream start smaller with more blocks."""
        width = self.resblocks[0].ln_1.normalized_shape[0]
        residual_std = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.zeros_(block.attn.in_proj_bias)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.zeros_(block.attn.out_proj.bias)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
