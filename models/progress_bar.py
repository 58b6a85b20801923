"""Progress bars of all that takes time."""

import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

from models.host import is_terminal

INTERVAL = 30  # seconds between two lines of a bar that is no terminal's


def progress_bar(items: Iterable | None = None, **options) -> tqdm:
    """tqdm's bar, on standard error. Where that is no terminal, but a file or a notebook, the bar
    is a line every 30 seconds, and one at the end unless `leave` is false."""
    if is_terminal(sys.stderr):
        return tqdm(items, **options)
    return tqdm(items, file=_Lines(sys.stderr), position=0, **options)


class _Lines:
    """Takes what tqdm draws over and over, and passes on a line now and then."""

    def __init__(self, stream: object):
        self.stream = stream
        self.line = ""
        self.written = time.monotonic()

    def write(self, text: str) -> None:
        self.line = text.strip() or self.line  # blanks wipe a bar away
        now = time.monotonic()
        if self.line and self.stream is not None and (
            text == "\n" or now - self.written >= INTERVAL  # tqdm ends a bar that stays so
        ):  # fmt: skip
            self.stream.write(f"{self.line}\n")
            self.line, self.written = "", now

    def flush(self) -> None:
        """Nothing waits: lines are written at once."""
