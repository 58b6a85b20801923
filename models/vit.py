"""The Vision Transformer tower (Dosovitskiy et al. 2021; for CLIP: Radford et al. 2021, 2.4)."""

import torch
from torch import Tensor, nn

from models.transformer import Layout, Transformer


class VisionTransformer(nn.Module):
    """Images `[n, 3, r, r]` -> features `[n, output_dim]`, read at the class token."""

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        tokens = (input_resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [n, patches, w]
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        n, length, _ = x.shape
        layout = Layout(length, read=torch.arange(n, device=x.device) * length)
        x = self.transformer(self.ln_pre(x).flatten(0, 1), layout)
        return self.ln_post(x) @ self.proj

    def initialize(self) -> None:
        """Random weights for training from scratch."""
        std = self.proj.shape[0] ** -0.5
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=std)
        self.transformer.initialize()
