"""Reading weights from the kinds of files people have, without running anything that is in them.

What a file says of itself is checked against its size before memory is taken for it.
"""

import math
import mmap
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import describe, one_line
from models.weights.unpickle import Module, PlainTensor, PlainUnpickler

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # buffers of published archives
LONGEST_NAME = 1000  # characters; a short pickle can nest modules, and so their names, very deep
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a TorchScript archive as published, a state dict (.pt, .pth, .safetensors), a
    checkpoint of ours (under `model`) or of open_clip (under `state_dict`, keys `module....`).

    Floats of all but .safetensors come as float32. Raises `InputError` that says what the file is
    instead; the caller names it.
    """
    if not path.is_file():
        raise InputError("is a folder, not a weights file; give a file in it")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # first: the length that stands before it can look like anything
        read = _read_safetensors
    elif start.startswith(b"PK\3\4"):
        read = _read_zip
    elif start.startswith(b"\x80"):
        read = _read_legacy
    else:
        raise InputError(f"{describe(path)}, not weights; download it anew")
    try:
        return read(path)
    except InputError:
        raise
    except Exception as error:  # a damaged file can break its reader in any way
        reason = one_line(error) or type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except OSError:
        raise
    except Exception:  # a damaged archive can break the reader in any way
        return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return _unwrap(load_file(path))


def read_content(path: Path, is_wanted: Callable[[Any], bool]) -> Any | None:
    """All that `torch.save` wrote to an archive: numbers, texts, lists, dicts, and tensors, whose
    floats come as float32. None for any other file, and for content that `is_wanted` refuses
    before its tensors are read. Raises `InputError` for tensors that are damaged."""
    with ExitStack() as stack:
        try:
            content, file, start_of = stack.enter_context(_opened(path))
        except Exception:  # `read_state_dict` says what it is
            return None
        if not is_wanted(content):
            return None
        places = {f"tensor {n}": place for n, place in enumerate(_places_of_tensors(content))}
        plain = {name: holder[key] for name, (holder, key) in places.items()}
        try:
            read = _read_tensors(file, plain, start_of)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"truncated or damaged ({one_line(error)})") from None
        for name, (holder, key) in places.items():
            holder[key] = read[name]
        return content


def _places_of_tensors(content: object) -> Iterator[tuple[dict | list, Any]]:
    """Every (dict, key) and (list, index) below `content` that holds a tensor, however deep."""
    seen, waiting = set(), [content]
    while waiting:
        holder = waiting.pop()
        if not isinstance(holder, dict | list) or id(holder) in seen:
            continue
        seen.add(id(holder))
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, PlainTensor):
                yield holder, key
            else:
                waiting.append(value)


def _read_zip(path: Path) -> dict[str, Tensor]:
    """The weights in an archive of `torch.save` or `torch.jit.save`."""
    with _opened(path) as (content, file, start_of):
        return _read_tensors(file, _unwrap(content), start_of)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, IO[bytes], Callable[[PlainTensor], int]]]:
    """What an archive holds, with tensors that have not been read; its file; and a function that
    finds the start of a tensor's numbers in it.

    Archives of `torch.save` and `torch.jit.save` are uncompressed zips: `data.pkl` pickles the
    content or the tree of modules, `data/<n>` holds the bytes of the n-th storage. The code in the
    latter is never looked at.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise InputError("an archive without weights (no data.pkl); is it another program's?")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in names:
            _refuse_big_endian(_record(archive, file, f"{root}byteorder", 6) == b"big")
        content = PlainUnpickler(BytesIO(_record(archive, file, pickled))).load()

        def start_of(tensor: PlainTensor) -> int:
            start, length = _locate(archive, file, f"{root}data/{tensor.storage.key}")
            if length < tensor.storage.numel * tensor.storage.dtype.itemsize:
                raise InputError(f"its record {tensor.storage.key!r:.40} is shorter than it says")
            return start

        yield content, file, start_of


def _locate(archive: zipfile.ZipFile, file: IO[bytes], name: str) -> tuple[int, int]:
    """Where the bytes of a record start in the file, and how many there are."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError("a compressed archive, which torch does not write; unpack and zip it anew")
    file.seek(info.header_offset + 26)
    name_length, extra_length = (int.from_bytes(file.read(2), "little") for _ in "ab")
    return info.header_offset + 30 + name_length + extra_length, info.file_size


def _record(archive: zipfile.ZipFile, file: IO[bytes], name: str, most: int | None = None) -> bytes:
    start, length = _locate(archive, file, name)
    file.seek(start)
    return file.read(min(length, most or _size(file)))


def _read_legacy(path: Path) -> dict[str, Tensor]:
    """The weights in a file of torch before 1.6: pickles of a magic number, a version, facts on the
    machine, the content and the storages' keys; then for each its number of items and its bytes."""
    with path.open("rb") as file:
        unpickler = PlainUnpickler(file)
        if unpickler.load() != LEGACY_MAGIC:
            raise InputError(
                "a pickle that torch.save did not write, and nothing in it was run; "
                "save a plain state dict with torch.save"
            )
        unpickler.load()
        machine, content, keys = (unpickler.load() for _ in range(3))
        _refuse_big_endian(isinstance(machine, dict) and machine.get("little_endian") is False)
        starts = {}
        for key in keys:
            storage = unpickler.storages[key if isinstance(key, str) else None]
            if int.from_bytes(file.read(8), "little") != storage.numel:
                raise InputError(f"its record {key!r:.40} is of another length than it says")
            starts[key] = file.tell()
            file.seek(storage.numel * storage.dtype.itemsize, os.SEEK_CUR)
        return _read_tensors(file, _unwrap(content), lambda tensor: starts[tensor.storage.key])


def _refuse_big_endian(is_big: bool) -> None:
    if is_big:
        raise InputError("written on a big-endian machine; save it anew on a common one")


def _unwrap(content: object) -> dict[str, Any]:
    """The state dict in what a file holds: names of weights to `Tensor` or `PlainTensor`."""
    if isinstance(content, Module):
        content = dict(_named_tensors(content))
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    weights = {str(key).removeprefix(prefix): value for key, value in content.items()}
    weights = {key: value for key, value in weights.items() if key not in NO_WEIGHTS}
    strange = [k for k, value in weights.items() if not isinstance(value, Tensor | PlainTensor)]
    if strange:
        raise InputError(f"no state dict: {one_line(', '.join(strange[:5]))} hold no tensors")
    return weights


def _named_tensors(root: Module) -> Iterator[tuple[str, PlainTensor]]:
    """The tensors of a tree of modules; a module that hangs in it twice is named once."""
    seen, waiting = {id(root)}, [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        for name, value in module.attributes.items():
            if isinstance(value, PlainTensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Module) and id(value) not in seen:
                if len(prefix) > LONGEST_NAME:
                    raise InputError("modules nested too deep for a CLIP model")
                seen.add(id(value))
                waiting.append((f"{prefix}{name}.", value))


def _read_tensors(
    file: IO[bytes], weights: dict[str, PlainTensor], start_of: Callable[[PlainTensor], int]
) -> dict[str, Tensor]:
    """The tensors, each in memory of its own, floats as float32."""
    claimed = 0
    for key, (storage, _, size, _) in weights.items():
        if math.prod(size) > storage.numel:
            raise InputError(f"{one_line(key)} claims more numbers than the file holds for it")
        claimed += math.prod(size) * storage.dtype.itemsize
    if claimed > _size(file):
        raise InputError(f"its tensors claim {claimed:,} bytes, but it has {_size(file):,}")
    return {key: _read_tensor(file, tensor, start_of(tensor)) for key, tensor in weights.items()}


def _read_tensor(file: IO[bytes], tensor: PlainTensor, start: int) -> Tensor:
    """One tensor, mapped, converted and let go, so that memory holds no second copy."""
    storage, offset, size, stride = tensor
    dtype = torch.float32 if storage.dtype.is_floating_point else storage.dtype
    if storage.numel == 0:
        return torch.empty(size, dtype=dtype)
    skip = start % mmap.ALLOCATIONGRANULARITY  # a map starts at a page
    length = skip + storage.numel * storage.dtype.itemsize
    mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start - skip)
    numbers = torch.frombuffer(mapped, dtype=storage.dtype, count=storage.numel, offset=skip)
    return numbers.as_strided(size, stride, offset).to(dtype, copy=True)


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
