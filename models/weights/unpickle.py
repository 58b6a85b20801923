"""Unpickling of what torch writes as plain data: nothing that a file names is imported or run."""

import pickle
import pickletools
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Any, NamedTuple

import torch

from models.errors import InputError

LARGEST_PICKLE = 4 << 20  # bytes, of 180 in memory at worst; a checkpoint of ViT-L has 230,000
LONGEST_NAME = 1000  # characters; a small file could nest modules, and so their names, very deep
NOT_RUN = "and nothing in it was run; save a plain state dict with torch.save"
OPCODES = {"APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID",
    "BINPUT", "BINUNICODE", "BUILD", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "GLOBAL", "LONG1",
    "LONG_BINGET", "LONG_BINPUT", "MARK", "NEWFALSE", "NEWOBJ", "NEWTRUE", "NONE", "PROTO", "STOP",
    "REDUCE", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}  # torch's  # fmt: skip
STORAGES = {"BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32,
    "Double": torch.float64, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "Short": torch.int16, "Int": torch.int32, "Long": torch.int64}  # fmt: skip
DTYPES = {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
OBJECTS = {"collections OrderedDict", "torch Size", "torch device", "_codecs encode",
    "__builtin__ set", *DTYPES}  # what a `PlainObject` stands for  # fmt: skip


class PlainTensor(NamedTuple):
    """A tensor, or a storage, whose numbers are still in the file."""

    key: str  # of the storage
    dtype: torch.dtype
    view: tuple[Any, ...] = ()  # offset, size, stride, and more that does not matter


class PlainObject(dict):
    """A dict, or stands for an object of any class: it only holds items and attributes."""

    def __init__(self, *_: Any): ...

    def __repr__(self) -> str:  # a small file can nest dicts so that their text has no end
        return f"a dict of {len(self)}"

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float | None):  # a nested tuple can take ages to hash
            raise ValueError(f"a key of type {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, PlainTensor]]:
        """Those of a module and of the modules in it, taken out, so that none comes twice."""
        while attributes := vars(self).get("attributes"):
            key, value = attributes.popitem()
            if len(name := f"{prefix}{key}") > LONGEST_NAME:
                raise InputError("modules nested too deep for a CLIP model")
            if isinstance(value, PlainTensor):
                yield name, value
            elif isinstance(value, PlainObject):
                yield from value.tensors(f"{name}.")


class PlainUnpickler(pickle.Unpickler):
    """Unpickles the next pickle of a file, whose position is then behind it. Raises `InputError`
    for all that weights do not need, and any other exception for a damaged pickle."""

    def __init__(self, file: IO[bytes]):
        self.dtypes: dict[str, torch.dtype] = {}  # of the storages, by key
        start, pickled, position = file.tell(), bytearray(file.read(2 * LARGEST_PICKLE)), 0
        for count, (opcode, argument, position) in enumerate(pickletools.genops(pickled)):
            if position > LARGEST_PICKLE:
                raise InputError(f"its pickle exceeds {LARGEST_PICKLE:,} bytes; save only weights")
            if opcode.name not in OPCODES:
                raise InputError(f"holds {opcode.name}, which torch does not write, {NOT_RUN}")
            if opcode.name == "LONG_BINPUT" and argument > count:  # would take memory up to it
                raise ValueError("a place in the memo beyond all values")
            if opcode.name == "EMPTY_DICT":  # becomes the next of `buffers`: checks keys
                pickled[position] = pickle.NEXT_BUFFER[0]
        file.seek(start + position + 1)
        super().__init__(BytesIO(pickled), buffers=iter(PlainObject, None))

    def persistent_load(self, reference: Any) -> PlainTensor:
        match reference:
            case "storage", torch.dtype() as dtype, str(key), _, int(), *view if not any(view):
                self.dtypes[key] = dtype
                return PlainTensor(key, dtype)
        raise ValueError("a storage of an unknown kind")

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" == "torch._utils _rebuild_tensor_v2":
            return lambda storage, *view: storage._replace(view=view)
        if f"{module} {name}" == "torch._utils _rebuild_parameter":
            return lambda parameter, *_: parameter  # new each time, since BUILD can change it
        if module == "torch" and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        if f"{module} {name}" in OBJECTS or module.startswith(("__torch__", "torch.jit._pickle")):
            return PlainObject
        raise InputError(f"asks for {f'{module} {name}'!r:.80}, which no weights need, {NOT_RUN}")
