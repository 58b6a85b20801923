"""The program that a script runs in: a shell, a notebook, a service without a console."""

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from models.errors import InputError


@contextmanager
def garbage_unsearched() -> Iterator[None]:
    """Turn garbage collection off during imports of large packages, which takes a fifth of the
    time; it never searches their objects later either. Also decorates functions."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`; a notebook gets its streams and signal handlers back. An
    `InputError` or an `OSError` ends it with its message and exit code 2 (with `--debug`, with its
    traceback), Ctrl-C with 130, a closed output, as by `| head`, with 141."""
    streams = sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.stdout, sys.stderr = map(_any_text, streams)
    os.environ["MPLBACKEND"] = "agg"  # pyzjr looks for a notebook's, which may not be installed
    try:
        main()
    except BrokenPipeError:
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush
        raise SystemExit(141) from None  # what a shell shows for programs that SIGPIPE ends
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        _end(f"error: {error}", 2)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except RuntimeError as error:
        signs = ("closed by peer", "reset by peer", "NCCL")  # the other process has the cause
        if os.environ.get("WORLD_SIZE", "1") != "1" and any(sign in str(error) for sign in signs):
            _end(f"stopped: another process has ended, or cannot exchange data: {error}", 1)
        raise
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _any_text(stream: TextIO | None) -> TextIO:
    """`stream`, set to take any text; a null stream if there is no console."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if isinstance(stream, io.TextIOWrapper):
        # Line by line, so that a log can be followed; UTF-8 in files and pipes on all systems.
        encoding = None if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
    return stream
