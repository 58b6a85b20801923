"""Data, loss and scores for training CLIP on captioned images."""

from importlib import import_module

_HOMES = {
    "Flickr8kDataset": "utils.flickr8k_dataloader",
    "contrastive_loss": "utils.loss",
    "compute_metrics": "utils.metric",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import a name when it is first used: torch takes seconds, and not every script needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
