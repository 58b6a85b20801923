"""Reading weights from the kinds of files people have, without running anything that is in them."""

import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from models.errors import InputError
from models.file_kind import describe

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # buffers of published archives
STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a TorchScript archive as published, a state dict (.pt, .pth, .safetensors), a
    checkpoint of ours (under `model`) or of open_clip (under `state_dict`, keys `module....`).

    Raises `InputError` that says what the file is instead; the caller names it.
    """
    if not path.is_file():
        raise InputError("is a folder, not a weights file")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(b"PK"):
        content = _read_torchscript(path) if is_torchscript(path) else _torch_load(path)
    elif path.suffix == ".safetensors" or start[8:9] == b"{":
        content = _read_safetensors(path)
    elif start.startswith(b"\x80"):
        content = _torch_load(path)
    else:
        raise InputError(f"{describe(path)}, not weights; download it anew")
    return _unwrap(content)


def _unwrap(content: object) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict")
    prefix = "module." if all(str(key).startswith("module.") for key in content) else ""
    weights = {str(key).removeprefix(prefix): value for key, value in content.items()}
    weights = {key: value for key, value in weights.items() if key not in NO_WEIGHTS}
    strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(f"no state dict: {', '.join(strange[:5])} hold no tensors")
    return weights


def _torch_load(path: Path) -> object:
    is_zip = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"holds more than tensors, and nothing in it was run ({reason}); "
            "save a plain state dict instead"
        ) from None
    except Exception as error:  # a damaged file can break torch's reader in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"truncated or damaged ({error}); download it anew") from None


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a TorchScript archive, floats as float32.

    Such an archive is an uncompressed zip: `data.pkl` pickles the tree of modules, `data/<n>` holds
    the n-th tensor's bytes. Only the tensors are taken, each mapped, converted and let go, so that
    memory holds no second copy; the code beside them is never looked at.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            pickled = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            return dict(_named_tensors(_ModuleReader(archive, file, pickled).load()))
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can break in any way
        reason = str(error) or type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


class _Module:
    """Stands for every class of a TorchScript archive: it only holds attributes."""


def _named_tensors(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")


class _Storage(NamedTuple):
    """Where the numbers of a tensor are in the file."""

    dtype: torch.dtype
    numel: int
    start: int  # byte


class _ModuleReader(pickle.Unpickler):
    """Unpickles modules and tensors; every other global is refused."""

    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], pickled: str):
        super().__init__(archive.open(pickled))
        self.archive = archive
        self.file = file
        self.root = pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Module,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.read_tensor
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists of numbers, marked with their type
            return _first_argument
        raise InputError(f"asks for {module}.{name}, which no weights need; nothing of it was run")

    def persistent_load(self, reference: tuple) -> _Storage:
        _, dtype, record, _, numel = reference
        info = self.archive.getinfo(f"{self.root}data/{record}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < numel * dtype.itemsize:
            raise InputError(f"its record {info.filename} is shorter than it says")
        self.file.seek(info.header_offset + 26)
        name_length, extra_length = (int.from_bytes(self.file.read(2), "little") for _ in "ab")
        return _Storage(dtype, numel, info.header_offset + 30 + name_length + extra_length)

    def read_tensor(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: object
    ) -> Tensor:
        """A tensor in memory of its own, floats as float32."""
        if storage.numel == 0:
            return torch.empty(size)
        skip = storage.start % mmap.ALLOCATIONGRANULARITY  # a map starts at a page
        length = skip + storage.numel * storage.dtype.itemsize
        begin = storage.start - skip
        mapped = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin)
        numbers = torch.frombuffer(mapped, dtype=storage.dtype, count=storage.numel, offset=skip)
        dtype = torch.float32 if storage.dtype.is_floating_point else storage.dtype
        return numbers.as_strided(size, stride, offset).to(dtype, copy=True)


def _first_argument(value: object, *_: object) -> object:
    return value
