"""One exception for everything a user can put right, and the way scripts end on it."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one or a few lines that name the file (and the field in it), what is wrong and
    what to do. Scripts print it without a traceback and exit with code 2.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main()`; an `InputError` becomes a clean message and exit code 2.

    `--debug` among the arguments shows the traceback instead.
    """
    try:
        main()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
