"""CLIP in PyTorch: both towers, the tokenizer, and the published weights."""

from importlib import import_module

_HOMES = {
    "CLIP": "models.clip",
    "build_model": "models.clip",
    "available_models": "models.clip_utils",
    "load": "models.clip_utils",
    "tokenize": "models.clip_utils",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import a name when it is first used: torch takes seconds, and not every script needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
