"""Signals to a process that waits for what does not come."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from script_runs import ROOT

from utils.machine import interrupt
from utils.machine.interrupt import Interrupt, signals_held_back

PROGRAM = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {root!r})
from utils.machine import interrupt
interrupt.ONE_SIGNAL = 0.2
noted = interrupt.Interrupt()
print("ready", flush=True)
{work}
raise noted.exit() if noted.has_come() else SystemExit(0)
"""
WAIT = "time.sleep(60)"

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")


def outcome(work: str, signals: list[int]) -> tuple[int, str, float]:
    """Exit code, errors and seconds of a program that gets signals half a second apart."""
    program = PROGRAM.format(root=str(ROOT), work=work)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)
        _, errors = process.communicate(timeout=30)
    return process.returncode, errors, time.monotonic() - started


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_waits(number):
    code, errors, seconds = outcome(WAIT, [number, number])
    assert "KeyboardInterrupt" in errors and code == -signal.SIGINT  # Python's own end
    assert seconds < 10


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch):
    """A scheduler sends it to every process, and torchrun passes its own on."""
    monkeypatch.setattr(interrupt, "ONE_SIGNAL", 30)
    noted = Interrupt()
    try:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert noted.signal == signal.SIGTERM
        assert noted.has_come() and noted.exit().code == 143
    finally:
        noted.release()


@posix
def test_a_signal_while_a_worker_starts_is_its_parents(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    noted = Interrupt()
    worker = multiprocessing.get_context("spawn").Process(target=sum, args=([],))
    try:
        with signals_held_back():
            signal.raise_signal(signal.SIGTERM)
            worker.start()
            assert not noted.has_come()
        assert noted.signal == signal.SIGTERM
    finally:
        noted.release()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.join()
    assert worker.exitcode == 0


STUCK_WORKER = """
class Stuck(multiprocessing.get_context("fork").Process):
    def run(self):
        interrupt.leave_signals_to_parent(0)
        time.sleep(60)
Stuck(daemon=True).start()
time.sleep(0.5)
"""


@posix
def test_a_program_ends_though_a_worker_is_stuck():
    code, errors, seconds = outcome(STUCK_WORKER, [])
    assert (code, errors) == (0, "") and seconds < 10
