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
def script_settings() -> Iterator[None]:
    """The settings that a script needs: streams that take any text, and matplotlib drawing into
    files. Afterwards, also after an error, a notebook has its streams and signal handlers again.
    Also decorates functions."""
    streams = sys.stdout, sys.stderr
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    backend = os.environ.get("MPLBACKEND")
    sys.stdout, sys.stderr = map(_any_text, streams)
    os.environ["MPLBACKEND"] = "agg"  # pyzjr looks for a notebook's, which may not be installed
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        del os.environ["MPLBACKEND"]
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


@contextmanager
def garbage_unsearched() -> Iterator[None]:
    """No search for garbage in the block, for imports of large packages: Python would search the
    hundreds of thousands of objects that they make, and keep, again and again, for a fifth of the
    time. Nor are they searched afterwards. Also decorates functions."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _any_text(stream: TextIO | None) -> TextIO:
    """`stream`, taking any text; what is written nowhere if there is no console."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if isinstance(stream, io.TextIOWrapper):
        # Lines at once: a log file can be followed. UTF-8 in files and pipes on all systems.
        encoding = None if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
    return stream


@script_settings()
def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`.

    An `InputError` ends the script with its message and exit code 2, and so does an `OSError`,
    whose message names the file. With `--debug` among the arguments the traceback is shown as well.
    Ctrl-C ends the script with exit code 130, and an output that nobody reads any more, as of
    `| head`, with 141 and no message.
    """
    try:
        main()
    except BrokenPipeError:
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush
        raise SystemExit(141) from None  # what a shell shows for programs that SIGPIPE ends
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if "home directory" in str(error):  # what `~` stands for
            print(f"error: {error} Give paths without ~", file=sys.stderr)
            raise SystemExit(2) from None
        if os.environ.get("WORLD_SIZE", "1") != "1" and any(
            text in str(error) for text in ("closed by peer", "reset by peer", "NCCL")
        ):  # only the process that fails first has something to tell
            print("stopped: another process of this run has ended", file=sys.stderr)
            raise SystemExit(1) from None
        raise
