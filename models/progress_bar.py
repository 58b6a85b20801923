"""Progress bars."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL = 30  # seconds between updates of a bar outside a terminal


def progress_bar(items: Iterable | None = None, **options) -> tqdm:
    """tqdm's bar on standard error, which disappears at its end. In a file or a notebook it is
    updated every 30 seconds, and what takes less has none."""
    if not sys.stderr.isatty():
        options |= dict.fromkeys(("delay", "mininterval", "maxinterval"), INTERVAL)
    return tqdm(items, leave=False, **options)
