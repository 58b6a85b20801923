"""`InputError`, for everything that a user can put right, and how a script ends with it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message has one or a few lines. It names the file (and the field in it), and says what is
    wrong and what to do. Scripts print it without a traceback and exit with code 2.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`.

    An `InputError` ends the script with its message and exit code 2, and so does an `OSError`,
    whose message names the file. With `--debug` among the arguments the traceback is shown as well.
    Ctrl-C ends the script with exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):  # not every console can show every caption
        stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        main()
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
