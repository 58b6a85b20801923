"""Ctrl-C and SIGTERM: they are noted, so that the step under way can end and be saved."""

import atexit
import multiprocessing.util  # before `end_workers` is registered, which is to run before its exit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOPPING = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL = 1.0  # seconds; a scheduler and torchrun both pass a signal on, a little apart
STANDSTILL = 30.0  # seconds without a step's answer
WORKING = 0.05  # share of the time that a process computes which is at work


class Interrupt:
    """Notes the first Ctrl-C or SIGTERM in `signal`, from its creation until `release`.

    A second one ends the program at once, and so do `STANDSTILL` seconds in which no step has asked
    for the signal (`has_come`) and the process has hardly computed anything: it waits for something
    that does not come. A long step, or the scores of an epoch, may take their time. In a thread,
    which gets no signals, it notes none.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self.noted = 0.0
        self.answered = threading.Event()
        in_main = threading.current_thread() is threading.main_thread()
        numbers = STOPPING if in_main else ()
        self.before = {number: signal.signal(number, self._note) for number in numbers}

    def has_come(self) -> bool:
        """Whether a signal has come; if so, the caller saves and ends the program."""
        if self.signal is not None:
            self.answered.set()
        return self.signal is not None

    def release(self) -> None:
        """Give the signals their earlier handlers back."""
        self.answered.set()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is None:
            self.signal, self.noted = signal.Signals(number), time.monotonic()
            threading.Thread(target=self._watch, daemon=True).start()
        elif number != self.signal or time.monotonic() - self.noted > ONE_SIGNAL:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            self._end("a second signal")

    def _watch(self) -> None:
        """End the program once it has stood still for `STANDSTILL` seconds."""
        computed = time.process_time()
        while not self.answered.wait(STANDSTILL):
            before, computed = computed, time.process_time()
            if computed - before < WORKING * STANDSTILL:
                self._end(f"no step has ended for {STANDSTILL:g} s after the signal")
                return

    def _end(self, reason: str) -> None:
        """End at once, from any thread. What stands on the disk is whole."""
        print(f"\nstopped: {reason}; the run goes on from its last checkpoint "
              "(--resume_training RUN)", file=sys.stderr, flush=True)  # fmt: skip
        end_workers()
        os._exit(128 + self.signal)

    def exit(self) -> SystemExit:
        """What ends a program that a signal has stopped, with the exit code that shells expect."""
        return SystemExit(128 + (self.signal or signal.SIGTERM))


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Signals come when the block has ended; to the processes that it starts, never, though they
    import packages for seconds before they can ignore any. Windows has no such thing."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # lets signals come again, once it runs
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(_worker: int) -> None:
    """Make a worker process ignore signals. A terminal's Ctrl-C and a scheduler's SIGTERM reach the
    workers too, but the parent needs them to end its step; they end when the parent ends."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left. Python sends its workers a SIGTERM when it ends, which these
    ignore, and waits for them: for ever, if one is stuck."""
    if not multiprocessing.active_children():
        return
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch reports killed workers as an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()
