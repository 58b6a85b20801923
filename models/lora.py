"""Low-rank adaptation (Hu et al. 2022): of each frozen matrix a change of low rank is learned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import CLIP
from models.config import Config
from models.errors import InputError
from models.transformer import MultiheadAttention

# The factor ALPHA / rank makes a step of Adam change a layer's outputs equally at any rank, so that
# the learning rate need not follow the rank (section 4.1).
ALPHA = 8


class LowRank(nn.Module):
    """The change of a matrix `[out, in]`: `ALPHA / rank * b @ a`, which is zero at first. In a
    stack of `parts` matrices, such as those of queries, keys and values, each has a change of its
    own: `a` is `[parts, rank, in]` and starts Gaussian, `b` is `[parts, out / parts, rank]` and
    starts as zero."""

    def __init__(self, weight: Tensor, rank: int, parts: int = 1):
        super().__init__()
        out, inputs = weight.shape
        self.a = nn.Parameter(weight.new_empty(parts, rank, inputs).normal_(std=inputs**-0.5))
        self.b = nn.Parameter(weight.new_zeros(parts, out // parts, rank))

    def forward(self, x: Tensor, parts: slice = slice(None)) -> Tensor:
        """`[..., in]` -> `[..., out]`, or the outputs of some parts, without computing `b @ a`."""
        a, b = self.a[parts], self.b[parts] * (ALPHA / self.a.shape[1])
        inner = F.linear(x, a.flatten(0, 1)).unflatten(-1, a.shape[:2])
        if len(a) == 1:
            return F.linear(inner.squeeze(-2), b[0])
        return torch.einsum("...pr,por->...po", inner, b).flatten(-2)


def add_lora(model: CLIP, rank: int) -> None:
    """Freeze all parameters, and add a trainable change of this rank, zero at first, to every
    linear layer of both transformers (attention and MLP) that was trainable, as in the paper
    (section 4.2) and in CLIP-LoRA (Zanella & Ben Ayed 2024). `InputError` for other towers."""
    if not isinstance(model.config, Config) or not model.config.is_vit:
        raise InputError("--lora is for CLIP's own ViTs, not for ResNets and models that open_clip "
                         "builds: leave it out, or try --lock_image N")  # fmt: skip
    learned = {parameter for parameter in model.parameters() if parameter.requires_grad}
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, MultiheadAttention) and module.in_proj_weight in learned:
            module.lora = LowRank(module.in_proj_weight, rank, parts=3)
        if isinstance(module, nn.Linear) and module.weight in learned:
            module.lora = LowRank(module.weight, rank)
            module.register_forward_hook(lambda linear, inputs, out: out + linear.lora(*inputs))


def merged(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its `LowRank` changes, if any, added to their matrices."""
    plain = {name: t for name, t in weights.items() if not name.endswith((".lora.a", ".lora.b"))}
    for name in weights.keys() - plain.keys():
        owner, _, factor = name.rpartition(".lora.")
        if factor == "a":
            a, b = weights[name], weights[f"{owner}.lora.b"]
            is_linear = f"{owner}.weight" in plain
            matrix = f"{owner}.weight" if is_linear else f"{owner}.in_proj_weight"
            plain[matrix] = plain[matrix] + (b @ a).flatten(0, 1) * (ALPHA / a.shape[1])
    return plain
