"""The one CLIP in what a file holds, without what training programs put around it."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import one_line
from models.weights.unpickle import PlainTensor

# A name that every CLIP has, with our keys and with those of transformers, then the same two for
# a Chinese-CLIP.
MARKS = ("ln_final.weight", "text_model.final_layer_norm.weight",
         "bert.embeddings.word_embeddings.weight",
         "text_model.embeddings.word_embeddings.weight")  # fmt: skip
PREFIX = re.compile(r"((module|_orig_mod|model|clip_model|clip)\.)*")  # of training programs
MAX_DEPTH = 8  # of dicts in dicts
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # buffers of published archives


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict of the CLIP in `content`: names of weights to `Tensor` or `PlainTensor`.

    It may be in dicts (`state_dict`, `model`, `ema` or any other name), and its names may have a
    `PREFIX`. Raises `InputError` if there is no state dict, or if there are several CLIPs, which it
    lists.
    """
    if _is_ours(content):
        content = content["model"]  # there may be an average as well
    found = dict(_clips(content, "", set()))
    if len(found) > 1:
        names = one_line(", ".join(sorted(found)))
        raise InputError(f"holds {len(found)} CLIP models ({names}); save the one you want alone")
    weights = next(iter(found.values())) if found else _only_dict(content)
    weights = {key: value for key, value in weights.items() if key not in NO_WEIGHTS}
    strange = [k for k, value in weights.items() if not isinstance(value, Tensor | PlainTensor)]
    if strange:
        raise InputError(f"no state dict: {one_line(', '.join(strange[:5]))} hold no tensors")
    return weights


def own_description(content: Any) -> dict[str, Any] | None:
    """open_clip's description of the model in a checkpoint of train.py; None for anything else."""
    return content.get("config") if _is_ours(content) else None


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and {"format", "model", "average"} <= content.keys()


def _clips(content: Any, place: str, seen: set[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The CLIPs in `content`, each with its place: the names of the dicts, and the prefix. A dict
    that is in `seen` is not looked at again, since a small file can hold one very often."""
    if not isinstance(content, dict) or id(content) in seen or place.count(".") > MAX_DEPTH:
        return
    seen.add(id(content))
    names = [name for name in content if isinstance(name, str)]
    for name in names:
        mark = next((mark for mark in MARKS if f".{name}".endswith(f".{mark}")), None)
        prefix = name.removesuffix(mark or "")
        if mark and PREFIX.fullmatch(prefix):
            weights = {n.removeprefix(prefix): content[n] for n in names if n.startswith(prefix)}
            yield f"{place}{prefix}".rstrip(".") or "the file itself", weights
    for name in names:
        yield from _clips(content[name], f"{place}{name}.", seen)


def _only_dict(content: Any) -> dict[str, Any]:
    """What should have been a state dict, for a message that says what is wrong with it."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}
