"""Ctrl-C and SIGTERM: noted, so that the present step can end and be saved."""

import atexit
import multiprocessing.util  # first, so that `end_workers` runs before its exit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOPPING = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL = 1.0  # seconds; a scheduler and torchrun both pass a signal on, a little apart


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM, until `release`. A second one ends the program at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.noted = 0.0
        self.before = {number: signal.signal(number, self._note) for number in STOPPING}

    def has_come(self) -> bool:
        return self.signal is not None

    def release(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def exit(self) -> SystemExit:
        """The end of the program, with the exit code that shells expect after a signal."""
        return SystemExit(128 + (self.signal or signal.SIGTERM))

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is None:
            self.signal, self.noted = signal.Signals(number), time.monotonic()
        elif number != self.signal or time.monotonic() - self.noted > ONE_SIGNAL:
            raise KeyboardInterrupt


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Block signals in the block, also in the processes that it starts; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # would unblock signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """Make a worker ignore Ctrl-C and SIGTERM: its parent needs it until the step has ended."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers, which ignore SIGTERM: Python would wait for ever for a stuck one."""
    workers = [worker for worker in multiprocessing.active_children() if worker.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports killed workers as an error
    for worker in workers:
        worker.kill()
