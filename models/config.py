"""The description of a model: its sizes, its activation, and how its images are prepared."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from models.errors import InputError, one_line, quoted

CONTEXT_LENGTH = 77  # tokens
CHINESE_CONTEXT_LENGTH = 52  # tokens of a text in the training of Chinese-CLIP
VOCABULARY = 49408  # tokens that CLIP's tokenizer knows; the last is the end-of-text token
CHINESE_VOCABULARY = 21128  # tokens of BERT's Chinese vocabulary
MAX_RESOLUTION = 10_000  # pixels: 100 million an image
# The module of each text tower, with a class `TextTower`.
TEXT_TOWERS = {"clip": "models.clip_text", "bert": "models.bert"}
CHOICES = {
    "activation": ("quick_gelu", "gelu"),
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "squash"),
    "text_tower": tuple(TEXT_TOWERS),
}

Colour = tuple[float, float, float]  # red, green and blue, from 0 to 1
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """Everything about a CLIP model but its weights.

    `vision_layers` is the number of blocks of a ViT, or the numbers of bottlenecks in the four
    stages of a ResNet, which has no `vision_patch_size` and no `vision_mlp_width`. Resolution and
    patch size are in pixels, `context_length` in tokens; widths are numbers of channels, those of
    heads and MLPs for one attention head and for the hidden layer. The defaults are those of the
    published models (Radford et al. 2021, tables 19 and 20).

    `text_tower` is one of `TEXT_TOWERS`. BERT, as in Chinese-CLIP (Yang et al. 2022), always has
    GELU, and embeddings for `text_positions` tokens, of which a text uses the first
    `context_length`; `activation` is then that of the image tower.

    Images are resized with `interpolation`: in `resize_mode` "shortest" the short side to the
    resolution, followed by a centre crop; in "squash" both sides. Each channel, from 0 to 1, is
    normalised by `mean` and `std`.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    vision_patch_size: int | None
    vision_mlp_width: int | None
    transformer_width: int
    transformer_mlp_width: int
    transformer_heads: int
    transformer_layers: int
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = VOCABULARY
    vision_head_width: int = 64
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    text_tower: str = "clip"
    text_positions: int | None = None
    mean: Colour = OPENAI_MEAN
    std: Colour = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    @property
    def is_vit(self) -> bool:
        """Whether the image tower is a ViT, not a ResNet."""
        return self.vision_patch_size is not None

    @property
    def last_width(self) -> int:
        """The channels of the image tower's last layer; a ResNet's width grows 32-fold."""
        return self.vision_width if self.is_vit else 32 * self.vision_width

    @property
    def vision_heads(self) -> int:
        """The attention heads of a ViT's blocks, or of a ResNet's attention pooling."""
        return self.last_width // self.vision_head_width


def check_config(config: Config) -> None:
    """Raise `InputError` for fields of a wrong type and for sizes that no model can have."""
    absent = set() if config.is_vit else {"vision_patch_size", "vision_mlp_width"}
    absent |= {"text_positions"} if config.text_tower == "clip" else set()
    for name, value in vars(config).items():  # not asdict: it copies what may be nested deep
        if name in ("mean", "std"):
            fits = isinstance(value, tuple) and len(value) == 3
            fits = fits and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
        elif name in CHOICES:
            fits = value in CHOICES[name]
        elif value is None:
            fits = name in absent
        elif name == "vision_layers" and not config.is_vit:
            is_tuple = isinstance(value, tuple)
            fits = is_tuple and list(map(type, value)) == [int] * 4 and min(value) > 0
        else:
            fits = type(value) is int and value > 0
        if not fits:
            raise InputError(f"its {name} would be {quoted(value)}")
    if config.context_length > (config.text_positions or math.inf):
        raise InputError(f"its context_length {config.context_length} is more than the "
                         f"{config.text_positions} positions of its text tower")  # fmt: skip
    towers = [("transformer_width", config.transformer_heads, config.transformer_width)]
    if config.is_vit:
        towers.append(("vision_width", config.vision_heads, config.vision_width))
    for name, heads, width in towers:
        if heads == 0 or width % heads:
            raise InputError(f"its {name} {width} is no multiple of its {heads} attention heads")


@contextmanager
def describing() -> Iterator[None]:
    """Turn any error while a description is read into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"its description is not that of a CLIP ({one_line(error)})") from None
