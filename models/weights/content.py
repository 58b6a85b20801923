"""All that `torch.save` wrote to an archive, not its weights alone; no code in it is run."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import one_line
from models.weights.read import copied, load_zip
from models.weights.unpickle import PlainTensor


def read_content(path: Path, is_wanted: Callable[[Any], bool]) -> Any | None:
    """Numbers, texts, lists, tuples, dicts, and tensors, whose floats come as float32.

    None for a file that is no such archive, and for content that `is_wanted` refuses before its
    tensors are read. Raises `InputError` for content that is damaged.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content, records = load_zip(mapped)
    except Exception:  # `read_state_dict` says what it is
        return None
    if not is_wanted(content):
        return None
    try:
        plain = _plain_tensors(content)
        return _filled(content, copied(plain, records, mapped), {})
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"truncated or damaged ({one_line(error)})") from None


def _plain_tensors(content: Any) -> dict[int, PlainTensor]:
    """Every tensor below `content` whose numbers have not been read, by its identity."""
    found, seen, waiting = {}, set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, PlainTensor):
            found[id(value)] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return found


def _filled(value: Any, tensors: dict[int, Tensor], done: dict[int, Any]) -> Any:
    """`value` with tensors in the place of the plain ones. A dict or list that comes several times
    is filled once (`done`), since a small file can hold one very often."""
    if isinstance(value, PlainTensor):
        return tensors[id(value)]
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            done[id(value)] = {k: _filled(v, tensors, done) for k, v in value.items()}
        else:
            kind = tuple if isinstance(value, tuple) else list
            done[id(value)] = kind(_filled(v, tensors, done) for v in value)
    return done[id(value)]
