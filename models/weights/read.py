"""Reading of weights from files of torch and safetensors; no code in a file is run."""

import mmap
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import InputError, one_line
from models.files import describe, names_in_archive
from models.weights import safetensors_file
from models.weights.unpickle import NOT_RUN, PlainObject, PlainTensor, PlainUnpickler

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
# Names of weights that every CLIP has: with our keys (open_clip has `text.` before some) and with
# those of transformers, then the same for a Chinese-CLIP.
TEXT_MARKS = ("text.ln_final.weight", "ln_final.weight", "text_model.final_layer_norm.weight",
              "bert.embeddings.word_embeddings.weight",
              "text_model.embeddings.word_embeddings.weight")  # fmt: skip
IMAGE_MARKS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
# Parts of names that come from parallel, compiled and wrapped modules within a model.
INSERTED = re.compile(r"(?<=\.)(module|_orig_mod|_forward_module|_\w+_wrapped_module)\.")
MAX_DEPTH = 8  # of dicts in dicts
# Buffers: of published archives, and of open_clip's text towers.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights that `read_file` finds."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a published TorchScript archive or in a state dict (.pt, .pth, .bin,
    .safetensors), wrapped or not, see `unwrap`; and open_clip's description of their model if the
    file has one (a checkpoint of train.py, a .safetensors of convert.py).

    Floats are float32, except from .safetensors. Raises `InputError`, which describes any other
    file; the caller names the file.
    """
    kind = weights_format(path)
    try:
        if kind == "safetensors":
            weights, description = safetensors_file.read(path)
            return unwrap(weights), description
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content, records = load_zip(mapped) if kind == "zip" else _load_legacy(mapped)
        own = content.get("config") if _is_checkpoint(content) else None
        return copied(unwrap(content), records, mapped), own
    except InputError:
        raise
    except Exception as error:  # a damaged file can break its reader in any way
        reason = one_line(error) or type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


def load_zip(file: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    """The content of an archive of `torch.save` or `torch.jit.save`, and its records by name."""
    records = {}
    for info in zipfile.ZipFile(file).infolist():
        if info.compress_type == zipfile.ZIP_STORED:
            lengths = struct.unpack_from("<HH", file, info.header_offset + 26)  # of name and extra
            start = info.header_offset + 30 + sum(lengths)
            records[info.filename.partition("/")[2]] = memoryview(file)[start:][: info.file_size]
    if "data.pkl" not in records:
        raise InputError(
            "an archive without an uncompressed data.pkl, so not torch's; if the weights file is "
            "in it, unpack it"
        )
    if records.get("byteorder") == b"big":
        raise InputError("written on a big-endian machine; save it anew on a common one")
    content = PlainUnpickler(BytesIO(records["data.pkl"])).load()
    return dict(content.tensors()) if "constants.pkl" in records else content, records


def _load_legacy(file: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    """The same for a file of torch before 1.6: pickles of a magic number, a version, the machine,
    the content and the storages' keys; then the number of items and the bytes of each storage."""
    pickles = (PlainUnpickler(file) for _ in range(5))
    if next(pickles).load() != LEGACY_MAGIC:
        raise InputError(f"a pickle of another program than torch, {NOT_RUN}")
    _, _, pickled, keys = pickles
    content, records = pickled.load(), {}
    for key in keys.load():
        dtype = pickled.dtypes[key if isinstance(key, str) else None]
        size = int.from_bytes(file.read(8), "little") * dtype.itemsize
        records[f"data/{key}"] = memoryview(file)[file.tell() : file.tell() + size]
        file.seek(file.tell() + size)
    return content, records


def copied(weights: dict, records: dict, file: mmap.mmap) -> dict[str, Tensor]:
    """The tensors of `PlainTensor`s, each in memory of its own, floats as float32."""
    copies, claimed = {}, 0
    for name, (key, dtype, (offset, size, stride, *_)) in weights.items():
        data = records[f"data/{key}"] or bytearray(8)  # torch refuses an empty buffer
        numbers = torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)
        claimed += numbers.numel() * numbers.itemsize
        if claimed > len(file) or numbers.ndim > 8:  # dimensions
            raise InputError(f"its tensors claim more than its {len(file):,} bytes")
        copies[name] = numbers.to(torch.float32 if dtype.is_floating_point else dtype, copy=True)
        if hasattr(file, "madvise"):  # the file's numbers leave the memory again
            file.madvise(mmap.MADV_DONTNEED)
    return copies


def read_content(path: Path, is_wanted: Callable[[Any], bool]) -> Any | None:
    """The content of an archive of `torch.save`: numbers, texts, lists, tuples, dicts, and tensors,
    floats as float32.

    None for any other file, and if `is_wanted` refuses the content, before tensors are read. Raises
    `InputError` for damaged content.
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
    """The `PlainTensor`s within `content`, by identity."""
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
    """`value` with tensors in place of `PlainTensor`s. A dict or list that occurs again is filled
    once (`done`), because a small file can repeat one very often."""
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


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict of the CLIP in `content`: names of weights to `Tensor` or `PlainTensor`.

    The state dict may be within dicts of any names (`state_dict`, `model`, `ema`), or a module
    pickled whole. Its names may have a prefix and `INSERTED` parts. Raises `InputError` if there is
    no state dict, or if there are several CLIPs.
    """
    if _is_checkpoint(content):
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


def _is_checkpoint(content: Any) -> bool:
    """Whether this is a checkpoint of train.py."""
    return isinstance(content, dict) and {"format", "model", "average"} <= content.keys()


def _clips(
    content: Any, place: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The CLIPs in `content`, each with the names of the dicts around it and its prefix. Dicts in
    `seen` are skipped, because a small file can repeat one very often."""
    if not isinstance(content, dict) or id(content) in seen or len(place) > MAX_DEPTH:
        return
    seen.add(id(content))
    if isinstance(content, PlainObject) and content.is_module:
        content = dict(content.tensors())
    values = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: t for name, t in values.items() if isinstance(t, Tensor | PlainTensor)}
    plain = {INSERTED.sub("", name): tensor for name, tensor in tensors.items()}
    if len(plain) == len(tensors):  # else the inserted parts tell two models apart
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
        marks = (*TEXT_MARKS, *IMAGE_MARKS)
        mark = next((mark for mark in marks if f".{name}".endswith(f".{mark}")), None)
        if mark:
            towers.setdefault(name.removesuffix(mark), set()).add(mark in IMAGE_MARKS)
    return [prefix for prefix, found in towers.items() if len(found) == 2] or list(towers)


def _only_dict(content: Any) -> dict[str, Any]:
    """The dict that should have been a state dict, for an error message."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}


def weights_format(path: Path) -> str:
    """The format of a weights file by its first bytes: "safetensors", "zip" (`torch.save` or
    TorchScript) or "legacy" (`torch.save` before torch 1.6). Raises `InputError` for another."""
    if not path.is_file():
        raise InputError("is a folder, not a weights file; give a file in it")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # first, because the header's length before it can be any bytes
        return "safetensors"
    if start.startswith(b"PK\3\4"):
        return "zip"
    if start.startswith(b"\x80"):
        return "legacy"
    raise InputError(
        f"{describe(path)}, not weights; download it anew, as .safetensors, .bin, .pt or .pth"
    )


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save`."""
    return any(name.endswith("/constants.pkl") for name in names_in_archive(path) or [])
