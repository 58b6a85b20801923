"""CLIP in PyTorch (Radford et al. 2021): both towers, the tokenizer, the published weights."""

from importlib import import_module

_HOMES = {  # the module that defines each public name
    "CLIP": "models.clip",
    "build_model": "models.clip_utils",
    "available_models": "models.weights.registry",
    "load": "models.clip_utils",
    "tokenize": "models.clip_utils",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Import a name when it is first used, because importing torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
