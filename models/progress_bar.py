"""Progress bars."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

INTERVAL = 30  # seconds between updates of a bar outside a terminal


def progress_bar(items: Iterable | None = None, **options) -> tqdm:
    """tqdm's bar on standard error, updated every 30 seconds in a file or a notebook."""
    if not sys.stderr.isatty():
        options |= {"mininterval": INTERVAL, "maxinterval": INTERVAL}
    return tqdm(items, **options)
