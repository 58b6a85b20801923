"""The Vision Transformer as image tower (Dosovitskiy et al. 2021; Radford et al. 2021, 2.4)."""

import torch
from torch import Tensor, nn

from models.config import Config
from models.packing import Layout
from models.transformer import LayerNorm, Transformer


class VisionTransformer(nn.Module):
    """A transformer over square patches of an image, pooled at the class token."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_resolution = config.image_resolution  # pixels, r below
        patch_size, width = config.vision_patch_size, config.vision_width
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        tokens = (config.image_resolution // patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width,
            config.vision_layers,
            config.vision_heads,
            config.vision_mlp_width,
            config.activation,
        )
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images `[n, 3, r, r]` -> features `[n, embed_dim]`."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [n, patches, w]
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding
        n, length, _ = x.shape
        layout = Layout(length, pooled=torch.arange(n, device=x.device) * length)
        x = self.transformer(self.ln_pre(x).flatten(0, 1), layout)
        return self.ln_post(x) @ self.proj

    def initialize(self) -> None:
        std = self.proj.shape[0] ** -0.5
        for weight in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(weight, std=std)
        self.transformer.initialize()
