"""`InputError`, for everything that a user can put right, and how a script ends with it."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from models.host import script_settings


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message has one or a few lines. It names the file (and the field in it), and says what is
    wrong and what to do. Scripts print it without a traceback and exit with code 2.
    """


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
