"""The one CLIP in what a file holds, without what training programs put around it."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import one_line
from models.weights.unpickle import PlainObject, PlainTensor

# Names of weights that every CLIP has: with our keys (open_clip has `text.` before some) and with
# those of transformers, then the same for a Chinese-CLIP.
TEXT_MARKS = ("text.ln_final.weight", "ln_final.weight", "text_model.final_layer_norm.weight",
              "bert.embeddings.word_embeddings.weight",
              "text_model.embeddings.word_embeddings.weight")  # fmt: skip
IMAGE_MARKS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
MARKS = (*TEXT_MARKS, *IMAGE_MARKS)
# What parallel, compiled and wrapped modules put into names; at their start it is a prefix.
INSERTED = re.compile(r"(?<=\.)(module|_orig_mod|_forward_module|_\w+_wrapped_module)\.")
MAX_DEPTH = 8  # of dicts in dicts
# Buffers: of published archives, and of open_clip's text towers.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict of the CLIP in `content`: names of weights to `Tensor` or `PlainTensor`.

    It may be in dicts (`state_dict`, `model`, `ema` or any other name) or be a module that was
    pickled whole, and its names may have any prefix, and what is `INSERTED`. Raises `InputError` if
    there is no state dict, or if there are several CLIPs, which it lists.
    """
    if _is_ours(content):
        content = content["model"]  # there may be an average as well
    found = dict(_clips(content, (), set()))
    if len(found) > 1:
        names = one_line(", ".join(sorted(found)))
        raise InputError(f"holds {len(found)} CLIP models ({names}); save the one you want alone")
    weights = next(iter(found.values())) if found else _only_dict(content)
    weights = {k: value for k, value in weights.items() if k.split(".")[-1] not in NO_WEIGHTS}
    strange = [k for k, value in weights.items() if not isinstance(value, Tensor | PlainTensor)]
    if strange:
        raise InputError(f"no state dict: {one_line(', '.join(strange[:5]))} hold no tensors")
    return weights


def own_description(content: Any) -> dict[str, Any] | None:
    """open_clip's description of the model in a checkpoint of train.py; None for anything else."""
    return content.get("config") if _is_ours(content) else None


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and {"format", "model", "average"} <= content.keys()


def _clips(
    content: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The CLIPs in `content`, each with the names of the dicts it is in and its prefix. A dict that
    is in `seen` is not looked at again, since a small file can hold one very often."""
    if not isinstance(content, dict) or id(content) in seen or len(place) > MAX_DEPTH:
        return
    seen.add(id(content))
    if isinstance(content, PlainObject) and content.is_module:
        content = dict(content.tensors())
    values = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: t for name, t in values.items() if isinstance(t, Tensor | PlainTensor)}
    plain = {INSERTED.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) == len(tensors):  # else what is inserted tells two models apart
        tensors = plain
    for prefix in _prefixes(tensors):
        weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if TEXT_MARKS[0] in weights:
            weights = {name.removeprefix("text."): tensor for name, tensor in weights.items()}
        yield ".".join((*place, prefix)).rstrip(".") or "the file itself", weights
    for name, value in values.items():
        yield from _clips(value, (*place, name), seen)


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of the whole CLIPs among the names; if there is none, those of single towers."""
    towers: dict[str, set[bool]] = {}
    for name in names:
        mark = next((mark for mark in MARKS if f".{name}".endswith(f".{mark}")), None)
        if mark:
            towers.setdefault(name.removesuffix(mark), set()).add(mark in IMAGE_MARKS)
    return [prefix for prefix, found in towers.items() if len(found) == 2] or list(towers)


def _only_dict(content: Any) -> dict[str, Any]:
    """What should have been a state dict, for a message that says what is wrong with it."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}
