"""Reads the pickles that torch writes as plain data: nothing they name is imported or called.

Python's own `pickle` calls what a file tells it to. Kept from that, it can still be made to fill
the memory (a place in its memo costs six bytes to ask for and gigabytes to make) or to hang (a
tuple of itself, nested sixty times, is hashed 2^60 times). Here every step costs what it reads.
"""

import pickletools
from typing import IO, Any, NamedTuple

import torch

from models.errors import InputError

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
CALLS = {  # what a pickle may call, and the name of what happens instead
    "collections OrderedDict": "dict",
    "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_parameter": "first argument",
    "torch Size": "first argument",
    "torch device": "first argument",
    "_codecs encode": "first argument",  # bytes
    "__builtin__ set": "first argument",
}
MOST_DIMENSIONS = 8


class Storage(NamedTuple):
    """Numbers in the file, that one or more tensors are made of."""

    dtype: torch.dtype
    key: str
    numel: int


class PlainTensor(NamedTuple):
    """A tensor whose numbers have not been read."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Module:
    """Stands for an object of any class of a TorchScript archive: it only holds attributes."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}


class _Named(NamedTuple):
    """Stands for a global that a pickle names."""

    name: str


class PlainUnpickler:
    """A stack machine for the opcodes (`pickletools`) that torch's two picklers write.

    `load` reads one pickle and leaves the file behind its end. A tensor becomes a `PlainTensor`, an
    object of a TorchScript class a `Module`, an OrderedDict a dict. Raises `InputError` for all
    that weights do not need, and any other exception for a damaged pickle.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(self.file):
            self._step(opcode.name, argument)
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match opcode:
            case "PROTO" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                push(argument)
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(opcode == "NEWTRUE")
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "MARK":
                self.marks.append(len(self.stack))
            case "TUPLE":
                push(tuple(self._since_mark()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if opcode == "EMPTY_TUPLE" else int(opcode[-1])
                push(tuple(reversed([pop() for _ in range(count)])))
            case "EMPTY_LIST":
                push([])
            case "APPEND" | "APPENDS":
                items = [pop()] if opcode == "APPEND" else self._since_mark()
                _typed(self.stack[-1], list).extend(items)
            case "EMPTY_DICT":
                push({})
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if opcode == "SETITEM" else self._since_mark()
                target = _typed(self.stack[-1], dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    target[_typed(key, str | int | float | None)] = value
            case "GLOBAL":
                push(_global(argument))
            case "BINPERSID":
                push(self._storage(pop()))
            case "NEWOBJ" | "REDUCE":
                arguments, function = _typed(pop(), tuple), pop()
                push(_call(_typed(function, _Named).name, arguments))
            case "BUILD":
                state = pop()
                if isinstance(self.stack[-1], Module):
                    self.stack[-1].attributes = _typed(state, dict)
                else:
                    _typed(self.stack[-1], dict)  # an OrderedDict's attributes, which no one needs
            case _:
                raise InputError(
                    f"its pickle holds {opcode}, which torch.save does not write, and nothing in "
                    "it was run; save a plain state dict with torch.save"
                )

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _storage(self, reference: object) -> Storage:
        kind, dtype, key, _, numel, *view = _typed(reference, tuple)
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("a storage of an unknown kind")
        storage = Storage(_typed(dtype, torch.dtype), _typed(key, str), _natural(numel))
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("two storages share a key")
        return storage


def _global(name: str) -> object:
    module, _, attribute = name.partition(" ")
    if module == "torch" and attribute in STORAGES:
        return STORAGES[attribute]
    if module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype):
        return _Named(name)
    if name in CALLS or module.startswith("__torch__") or module == "torch.jit._pickle":
        return _Named(name)
    raise InputError(
        f"asks for {name!r:.80}, which no weights need, and nothing in it was run; "
        "save a plain state dict instead"
    )


def _call(name: str, arguments: tuple) -> object:
    if name.startswith("__torch__"):
        return Module()
    match CALLS.get(name, "first argument"):
        case "tensor":
            storage, offset, size, stride, *_ = arguments
            return PlainTensor(
                _typed(storage, Storage), _natural(offset), _naturals(size), _naturals(stride)
            )
        case "dict":
            if arguments:
                raise ValueError("an OrderedDict with arguments")
            return {}
        case _:  # TorchScript's lists of numbers, marked with their type, among others
            return arguments[0] if arguments else None


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{type(value).__name__} in an unfit place")
    return value


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size that is none")
    return value


def _naturals(values: object) -> tuple[int, ...]:
    if len(_typed(values, tuple)) > MOST_DIMENSIONS:
        raise ValueError("a tensor of too many dimensions")
    return tuple(_natural(value) for value in values)
