"""Restricted unpickling of checkpoints: nothing that a file names is imported or run.

It stays while torch below 2.10 is allowed, because a file could make torch's own `weights_only`
corrupt memory (CVE-2026-24747). It also skips objects that `weights_only` refuses.
"""

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
OPCODES = {
    "ADDITEMS", "APPEND", "APPENDS", "BINBYTES", "BINBYTES8", "BINFLOAT", "BINGET", "BININT",
    "BININT1", "BININT2", "BINPERSID", "BINPUT", "BINUNICODE", "BINUNICODE8", "BUILD", "BYTEARRAY8",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE", "FRAME", "FROZENSET", "GLOBAL", "LONG1",
    "LONG4", "LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWOBJ", "NEWOBJ_EX",
    "NEWTRUE", "NONE", "POP", "POP_MARK", "PROTO", "REDUCE", "SETITEM", "SETITEMS",
    "SHORT_BINBYTES", "SHORT_BINUNICODE", "STACK_GLOBAL", "STOP", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3"}  # of protocols 2 to 5  # fmt: skip
# These opcodes would hash content of the file, and a nested tuple can take ages to hash. They are
# replaced: the next of `buffers` is a `PlainObject`.
REPLACED = {"EMPTY_DICT": pickle.NEXT_BUFFER, "EMPTY_SET": pickle.NEXT_BUFFER,
            "FROZENSET": pickle.TUPLE}  # fmt: skip
STORAGES = {"BFloat16": torch.bfloat16, "Half": torch.float16, "Float": torch.float32,
    "Double": torch.float64, "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8,
    "Short": torch.int16, "Int": torch.int32, "Long": torch.int64}  # fmt: skip
FUNCTIONS = {  # stand-ins by name, new each time, because the opcode BUILD can change them
    "_rebuild_tensor_v2": lambda: lambda storage, *view: storage._replace(view=view),
    "_rebuild_parameter": lambda: lambda parameter, *_: parameter,
    "_rebuild_parameter_with_state": lambda: lambda parameter, *_: parameter,
    "_rebuild_from_type_v2": lambda: lambda function, _, arguments, *__: function(*arguments),
    "getattr": lambda: lambda *_: PlainObject,  # of a class within a class, before protocol 4
}
MODULE = ("_parameters", "_buffers", "_modules")  # attributes of a torch module


class PlainTensor(NamedTuple):
    """A tensor or a storage, not read from the file yet."""

    key: str  # of the storage
    dtype: torch.dtype
    view: tuple[Any, ...] = ()  # offset, size, stride, and more that does not matter


class PlainObject(dict):
    """A dict, an object of any class or the result of a function: holds items and attributes."""

    def __init__(self, *_: Any): ...

    def __repr__(self) -> str:  # a small file can nest dicts so that their text has no end
        return f"a dict of {len(self)}"

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int | float | None):  # no other key is hashed, or kept
            super().__setitem__(key, value)

    def append(self, _: Any) -> None:
        """Drop an item of a list, a queue or a set."""

    extend = add = append

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, PlainTensor]]:
        """The tensors of a module and its submodules, taken out of it, so that none comes twice."""
        state = vars(self).get("attributes") or {}
        for attributes in [state[part] for part in MODULE if part in state] or [state]:
            while attributes:
                key, value = attributes.popitem()
                if len(name := f"{prefix}{key}") > LONGEST_NAME:
                    raise InputError("modules nested too deep for a CLIP model")
                if isinstance(value, PlainTensor):
                    yield name, value
                elif isinstance(value, PlainObject):
                    yield from value.tensors(f"{name}.")

    @property
    def is_module(self) -> bool:
        """Whether this is a torch module, pickled whole."""
        state = vars(self).get("attributes")
        return isinstance(state, dict) and set(MODULE) <= state.keys()


class PlainUnpickler(pickle.Unpickler):
    """Unpickles the next pickle of a file and moves the file's position behind it. Raises
    `InputError` for opcodes that torch does not write, other exceptions for a damaged pickle."""

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
            if opcode.name in REPLACED:
                pickled[position] = REPLACED[opcode.name][0]
        file.seek(start + position + 1)
        super().__init__(BytesIO(pickled), buffers=iter(PlainObject, None))

    def persistent_load(self, reference: Any) -> PlainTensor:
        match reference:
            case "storage", torch.dtype() as dtype, str(key), _, int(), *view if not any(view):
                self.dtypes[key] = dtype
                return PlainTensor(key, dtype)
        raise ValueError("a storage of an unknown kind")

    def find_class(self, module: str, name: str) -> Any:
        if name in FUNCTIONS:
            return FUNCTIONS[name]()
        if module == "torch" and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        return PlainObject
