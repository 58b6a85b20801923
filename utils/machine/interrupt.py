"""Ctrl-C and SIGTERM, noted so that the step under way can end and be saved."""

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """From its making to `release`, the first Ctrl-C or SIGTERM is noted in `signal`; another
    Ctrl-C ends the program at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.before = {number: signal.signal(number, self._note) for number in STOPPING}

    def release(self) -> None:
        """Let the signals do what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def exit(self) -> SystemExit:
        """The end of a program that a signal has stopped, with the exit code that shells expect."""
        return SystemExit(128 + (self.signal or signal.SIGTERM))


def leave_signals_to_parent(_worker: int) -> None:
    """For a worker process: a terminal's Ctrl-C and a scheduler's SIGTERM reach the whole group,
    but the parent still needs its workers to end the step; without it they end by themselves."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
