"""Ctrl-C and SIGTERM: they are noted, so that the step under way can end and be saved."""

import signal
import threading

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM in `signal`, from its creation until `release`. A second
    Ctrl-C ends the program at once. In a thread, which gets no signals, it notes none."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        in_main = threading.current_thread() is threading.main_thread()
        numbers = STOPPING if in_main else ()
        self.before = {number: signal.signal(number, self._note) for number in numbers}

    def release(self) -> None:
        """Give the signals their earlier handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def exit(self) -> SystemExit:
        """What ends a program that a signal has stopped, with the exit code that shells expect."""
        return SystemExit(128 + (self.signal or signal.SIGTERM))


def leave_signals_to_parent(_worker: int) -> None:
    """Make a worker process ignore signals. A terminal's Ctrl-C and a scheduler's SIGTERM reach the
    workers too, but the parent needs them to end its step; they end when the parent ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
