"""The program that a script runs in: a shell, a notebook, IDLE, a service without a console."""

import gc
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

ESCAPE_CODE = re.compile(r"\x1b(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")  # as terminals take for colours


@contextmanager
def script_settings() -> Iterator[None]:
    """The settings that a script needs; afterwards, also after an error, the host's own again. Also
    decorates functions.

    Standard output and error take any text, or are discarded where there is no console. Warnings
    are no errors: packages of others give some. matplotlib draws into files. Replacements of the
    two streams and of the handlers of Ctrl-C and SIGTERM end with the script.
    """
    with ExitStack() as stack:
        stack.enter_context(_handlers_restored())
        for name in ("stdout", "stderr"):
            stack.enter_context(_any_text(name))
        stack.enter_context(_no_warning_an_error())
        stack.enter_context(_pictures_into_files())
        yield


@contextmanager
def garbage_unsearched() -> Iterator[None]:
    """No search for garbage in the block, for imports of large packages: Python would search the
    hundreds of thousands of objects that they make, and keep, again and again, for a fifth of the
    time. Nor are they searched afterwards. Also decorates functions."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def is_terminal(stream: object) -> bool:
    """Whether what is written to `stream`, which may be anything, is shown on a terminal."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # not every host's stream has it; a closed stream
        return False


class Console:
    """Takes any text for a stream that may have `write` alone and may refuse some characters, such
    as those that stand for the bytes of a file name that is not UTF-8. Without `colours`, escape
    codes are left out."""

    def __init__(self, stream: object, colours: bool = False):
        self.stream = stream
        self.colours = colours

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = text if self.colours else ESCAPE_CODE.sub("", text)
        self.stream.write(shown.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        getattr(self.stream, "flush", lambda: None)()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def _any_text(name: str) -> Iterator[None]:
    """Make `sys.stdout` or `sys.stderr` take any text."""
    stream = getattr(sys, name)
    with ExitStack() as stack:
        stack.callback(setattr, sys, name, stream)
        if stream is None or getattr(stream, "closed", False):
            nowhere = open(os.devnull, "w", errors="replace")  # noqa: PTH123, SIM115
            setattr(sys, name, stack.enter_context(nowhere))
        elif isinstance(stream, io.TextIOWrapper):
            before = {a: getattr(stream, a) for a in ("encoding", "errors", "line_buffering")}
            # Lines at once: a log file can be followed. UTF-8 in files and pipes on all systems.
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
            stack.callback(_reconfigure, stream, before)
        else:
            setattr(sys, name, Console(stream))
        yield


def _reconfigure(stream: io.TextIOWrapper, settings: dict) -> None:
    with suppress(OSError, ValueError):  # it was closed, or what reads the output has ended
        stream.reconfigure(**settings)


@contextmanager
def _handlers_restored() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:  # only the main thread can have set one
                signal.signal(number, handler)


@contextmanager
def _no_warning_an_error() -> Iterator[None]:
    """Show warnings that `-W error` would raise, in this process and in those that it starts."""
    with warnings.catch_warnings(), ExitStack() as stack:
        if any(action == "error" for action, *_ in warnings.filters):
            warnings.simplefilter("default")
            stack.callback(setattr, sys, "warnoptions", sys.warnoptions)
            sys.warnoptions = [*sys.warnoptions, "default"]
        yield


@contextmanager
def _pictures_into_files() -> Iterator[None]:
    """Have matplotlib draw into files alone. pyzjr chooses that as well, but only after matplotlib
    has looked at MPLBACKEND, in which a notebook or a user may name what is not installed."""
    named = os.environ.get("MPLBACKEND")
    matplotlib, pyplot = (sys.modules.get(f"matplotlib{name}") for name in ("", ".pyplot"))
    used = pyplot.get_backend() if pyplot else named
    os.environ["MPLBACKEND"] = "agg"
    if matplotlib:
        matplotlib.use("agg")
    try:
        yield
    finally:
        if named is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = named
        if used and "matplotlib" in sys.modules:
            with suppress(ImportError, ValueError):  # which the host could not have used either
                sys.modules["matplotlib"].use(used)
