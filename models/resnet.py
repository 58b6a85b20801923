"""The ResNet as image tower (He et al. 2016, as changed by Radford et al. 2021, section 2.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import attend
from models.config import Config


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, with a shortcut around them (He et al. 2016, figure 5). With a
    stride, average pooling makes the image smaller: a convolution would skip pixels (Zhang 2019).
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1):
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample = None
        if stride > 1 or inplanes != outplanes:
            # The published weights call the convolution "0" and the norm "1"; the pooling before
            # them has no weights and is "-1".
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inplanes, outplanes, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(outplanes))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inplanes, h, w]` -> `[n, 4 * planes, h / s, w / s]`."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.avgpool(x)))
        return F.relu(x + shortcut)


class AttentionPool2d(nn.Module):
    """Multi-head attention of the mean over a feature map's positions to itself and all of them
    (Radford et al. 2021, section 2.4)."""

    def __init__(self, side: int, width: int, heads: int, output_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(side**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, h, w]` -> `[n, output_dim]`."""
        x = x.flatten(2).transpose(1, 2)  # [n, hw, c]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        mixed = attend((self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)), self.heads)
        return self.c_proj(mixed.squeeze(1))


class ModifiedResNet(nn.Module):
    """A stem of three convolutions, four stages of bottlenecks, then attention pooling."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_resolution = config.image_resolution  # pixels, r below
        layers, width = config.vision_layers, config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)

        expansion = Bottleneck.expansion
        self.layer1 = _stage(width, width, layers[0])
        self.layer2 = _stage(width * expansion, width * 2, layers[1], stride=2)
        self.layer3 = _stage(width * 2 * expansion, width * 4, layers[2], stride=2)
        self.layer4 = _stage(width * 4 * expansion, width * 8, layers[3], stride=2)
        self.attnpool = AttentionPool2d(
            config.image_resolution // 32,
            width * 8 * expansion,
            config.vision_heads,
            config.embed_dim,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images `[n, 3, r, r]` -> features `[n, output_dim]`."""
        if images.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            images = images.contiguous(memory_format=torch.channels_last)  # for tensor cores
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer2(self.layer1(self.avgpool(x)))
        return self.attnpool(self.layer4(self.layer3(x)))

    def initialize(self) -> None:
        """Draw random weights for training from scratch. The scale of a bottleneck's last norm is
        zero, so that it starts as its shortcut (Goyal et al. 2017, section 5.1)."""
        pool = self.attnpool
        std = pool.c_proj.in_features**-0.5
        nn.init.normal_(pool.positional_embedding, std=std)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(projection.weight, std=std)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


def _stage(inplanes: int, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
    first = Bottleneck(inplanes, planes, stride)
    others = (Bottleneck(planes * Bottleneck.expansion, planes) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
