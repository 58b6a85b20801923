"""The Vision Transformer as image tower (Dosovitskiy et al. 2021; Radford et al. 2021, 2.4)."""

import torch
from torch import Tensor, nn

from models.transformer import Layout, Transformer


class VisionTransformer(nn.Module):
    """A transformer over square patches of an image, pooled at the class token.

    `input_resolution` r and `patch_size` are in pixels.
    """

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
        """Preprocessed images `[n, 3, r, r]` -> features `[n, output_dim]`."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [n, patches, w]
        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        n, length, _ = x.shape
        layout = Layout(length, pooled=torch.arange(n, device=x.device) * length)
        x = self.transformer(self.ln_pre(x).flatten(0, 1), layout)
        return self.ln_post(x) @ self.proj

    def initialize(self) -> None:
        """Draw random weights for training from scratch."""
        std = self.proj.shape[0] ** -0.5
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=std)
        self.transformer.initialize()
