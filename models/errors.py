"""One exception for everything a user can put right, and the way scripts end on it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one or a few lines that name the file (and the field in it), what is wrong and
    what to do. Scripts print it without a traceback and exit with code 2.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`; an `InputError`, or an error of the file system, which names its
    file, becomes a clean message and exit code 2.

    `--debug` among the arguments shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):  # captions hold characters that a console may lack
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
