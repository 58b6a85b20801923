"""The smallest models, for tests in which only the number of parameters would take time."""

from dataclasses import replace

from models.clip import CLIP
from models.config import (
    CHINESE_CONTEXT_LENGTH,
    CHINESE_VOCABULARY,
    CONTEXT_LENGTH,
    VOCABULARY,
    Config,
)

TINY = Config(
    embed_dim=4, image_resolution=8, vision_layers=1, vision_width=64, vision_patch_size=4,
    vision_mlp_width=256, context_length=5, vocab_size=7, transformer_width=64,
    transformer_mlp_width=256, transformer_heads=1, transformer_layers=1,
)  # fmt: skip

# Models with two blocks in each tower that read images and captions; forks know them by name.
READING = replace(
    TINY, image_resolution=32, vision_patch_size=16, vision_layers=2, context_length=CONTEXT_LENGTH,
    vocab_size=VOCABULARY, transformer_width=8, transformer_mlp_width=32, transformer_layers=2,
)  # fmt: skip
NAMED = {
    "ViT-tiny": READING,
    "cn-tiny": replace(
        READING, text_tower="bert", vocab_size=CHINESE_VOCABULARY, resize_mode="squash",
        context_length=CHINESE_CONTEXT_LENGTH, text_positions=CHINESE_CONTEXT_LENGTH,
    ),
}  # fmt: skip


def tiny_clip(config: Config = TINY) -> CLIP:
    """With random weights."""
    return CLIP(config).initialize()
