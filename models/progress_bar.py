"""Progress bars of all that takes time."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL = 30  # seconds between two states of a bar that is no terminal's


def progress_bar(items: Iterable | None = None, **options) -> tqdm:
    """tqdm's bar, on standard error; in a file or a notebook it moves every 30 seconds."""
    if not sys.stderr.isatty():
        options |= {"mininterval": INTERVAL, "maxinterval": INTERVAL}
    return tqdm(items, **options)
