"""The smallest model, for tests in which only the number of its parameters would take time."""

from models.clip import CLIP
from models.config import Config

TINY = Config(
    embed_dim=4, image_resolution=8, vision_layers=1, vision_width=64, vision_patch_size=4,
    vision_mlp_width=256, context_length=5, vocab_size=7, transformer_width=64,
    transformer_mlp_width=256, transformer_heads=1, transformer_layers=1,
)  # fmt: skip


def tiny_clip() -> CLIP:
    """With random weights."""
    return CLIP(TINY).initialize()
