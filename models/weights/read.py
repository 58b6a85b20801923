"""Reading of weights from the kinds of files people have; no code in a file is run."""

import json
import mmap
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.errors import InputError
from models.weights.file_kind import one_line, weights_format
from models.weights.open_clip import CONFIG_FILE
from models.weights.unpickle import NOT_RUN, PlainUnpickler
from models.weights.unwrap import own_description, unwrap

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights that `read_file` finds."""
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a TorchScript archive as published, or in a state dict (.pt, .pth, .bin,
    .safetensors), which may be wrapped as `unwrap` describes it; and open_clip's description of
    their model, if the file holds it: a checkpoint of train.py, or safetensors of convert.py.

    Floats of all but .safetensors come as float32. Raises `InputError` that says what the file is
    instead; the caller names it.
    """
    kind = weights_format(path)
    try:
        if kind == "safetensors":
            return unwrap(load_file(path)), _in_metadata(path)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        content, records = load_zip(mapped) if kind == "zip" else _load_legacy(mapped)
        return copied(unwrap(content), records, mapped), own_description(content)
    except InputError:
        raise
    except Exception as error:  # a damaged file can break its reader in any way
        reason = one_line(error) or type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


def _in_metadata(path: Path) -> dict[str, Any] | None:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(CONFIG_FILE)
    return json.loads(text) if text else None


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
    """The same for a file of torch before 1.6: pickles of a magic number, a version, facts on the
    machine, the content and the storages' keys; then each storage's number of items and bytes."""
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
    """The `PlainTensor`s' numbers, each in memory of its own, floats as float32."""
    copies, claimed = {}, 0
    for name, (key, dtype, (offset, size, stride, *_)) in weights.items():
        data = records[f"data/{key}"] or bytearray(8)  # none of no bytes, which torch refuses
        numbers = torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)
        claimed += numbers.numel() * numbers.itemsize
        if claimed > len(file) or numbers.ndim > 8:  # dimensions
            raise InputError(f"its tensors claim more than its {len(file):,} bytes")
        copies[name] = numbers.to(torch.float32 if dtype.is_floating_point else dtype, copy=True)
        if hasattr(file, "madvise"):  # the file's numbers leave the memory again
            file.madvise(mmap.MADV_DONTNEED)
    return copies
