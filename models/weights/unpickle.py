"""Restricted unpickling of checkpoints: nothing that a file names is imported or run. It stays
while torch below 2.10 is allowed, because a file could make torch's own `weights_only` corrupt
memory (CVE-2026-24747). It also skips objects that `weights_only` refuses."""

import pickle
import pickletools
from collections.abc import Iterator
from io import BytesIO
from typing import Any, NamedTuple

import torch

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

    __hash__ = object.__hash__  # it may be a key, or in a set

    def __init__(self, *_: Any): ...

    def append(self, _: Any) -> None:
        """Drop an item of a list, a queue or a set."""

    extend = add = append

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, PlainTensor]]:
        """The tensors of a module and its submodules, by name."""
        state = vars(self).get("attributes") or {}
        for attributes in [state[part] for part in MODULE if part in state] or [state]:
            for key, value in attributes.items():
                if isinstance(value, PlainTensor):
                    yield f"{prefix}{key}", value
                elif isinstance(value, PlainObject):
                    yield from value.tensors(f"{prefix}{key}.")

    @property
    def is_module(self) -> bool:
        """Whether this is a torch module, pickled whole."""
        state = vars(self).get("attributes")
        return isinstance(state, dict) and set(MODULE) <= state.keys()


class PlainUnpickler(pickle.Unpickler):
    """Unpickles stand-ins for all that a file names. Raises any error for a damaged pickle."""

    def __init__(self, pickled: bytes):
        for count, (opcode, place, _) in enumerate(pickletools.genops(pickled)):
            if opcode.name == "LONG_BINPUT" and place > count:  # would take memory up to it
                raise ValueError("a place in the memo beyond all values")
        super().__init__(BytesIO(pickled))

    def persistent_load(self, reference: Any) -> PlainTensor:
        match reference:
            case "storage", torch.dtype() as dtype, str(key), *_:
                return PlainTensor(key, dtype)
        raise ValueError("a storage of an unknown kind")

    def find_class(self, module: str, name: str) -> Any:
        if name in FUNCTIONS:
            return FUNCTIONS[name]()
        if module == "torch" and name.removesuffix("Storage") in STORAGES:
            return STORAGES[name.removesuffix("Storage")]
        return PlainObject
