"""`InputError`, for all that a user can put right, and how messages show untrusted text."""

import difflib
import reprlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice


class InputError(ValueError):
    """A user's input cannot be used. The message names the file (and the field in it), the fault
    and the remedy, in a few lines. Scripts print it without a traceback and exit with code 2."""


def one_line(text: object) -> str:
    """Untrusted text as one printable line of at most 200 characters."""
    words = "".join(c if c.isprintable() else " " for c in f"{text!s:.1000}")
    return " ".join(words.split())[:200]


def quoted(value: object) -> str:
    """The `repr` of an untrusted value as one printable line of at most 60 characters."""
    return "".join(c if c.isprintable() else " " for c in reprlib.repr(value)[:60])


def listed(names: Collection[str]) -> str:
    """The first three names in one line, and the number of the others."""
    some = [name if name.isprintable() else repr(name) for name in islice(names, 3)]
    text = ", ".join(name if len(name) <= 90 else f"{name[:90]}..." for name in some)
    more = len(names) - len(some)
    return f"{text} and {more:,} more" if more else text or "none"


def near_names(name: str, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean ...?", with `known` names like `name`, or nothing."""
    by_lower = {known_name.lower(): known_name for known_name in known}
    near = difflib.get_close_matches(name.lower(), by_lower, cutoff=0.7)
    return f"; did you mean {' or '.join(by_lower[match] for match in near)}?" if near else ""


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Put `file` before an `InputError` raised within, and a remedy behind one that has none."""
    try:
        yield
    except InputError as error:
        remedy = "" if ";" in str(error) else "; download it anew"
        raise InputError(f"{file}: {error}{remedy}") from None
