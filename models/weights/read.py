"""Reading of weights from files of torch and safetensors; no code in a file is run."""

import mmap
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import InputError, one_line
from models.files import describe
from models.weights import safetensors_file
from models.weights.architecture import infer_config
from models.weights.open_clip import to_open_clip
from models.weights.unpickle import PlainObject, PlainTensor, PlainUnpickler

# Names of weights that every tower has, with our keys and with those of transformers.
TEXT_MARKS = ("ln_final.weight", "text_model.final_layer_norm.weight",
              "bert.embeddings.word_embeddings.weight",
              "text_model.embeddings.word_embeddings.weight")  # fmt: skip
IMAGE_MARKS = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
OWN_TEXT = "text."  # open_clip's prefix of the text tower in some models
# Parts of names that come from parallel, compiled and wrapped modules within a model.
INSERTED = re.compile(r"(?<=\.)(module|_orig_mod|_forward_module|_\w+_wrapped_module)\.")
# Buffers: of published archives, of open_clip's text towers, and of early transformers.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids",
              "token_type_ids")  # fmt: skip


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights in a published TorchScript archive or in a state dict (.pt, .pth, .bin,
    .safetensors), wrapped or not, see `unwrap`; and open_clip's description of their model if the
    file tells it (an archive, a checkpoint of train.py, a .safetensors of convert.py). Floats are
    float32, except from .safetensors. Raises `InputError`, without the name, for other files."""
    with _intact():
        if _is_safetensors(path):
            weights, description = safetensors_file.read(path)
            return unwrap(weights), description
        archive = Archive(path)
        weights = {name: archive.tensor(plain) for name, plain in unwrap(archive.content).items()}
        if archive.is_script:
            return weights, to_open_clip(infer_config(weights))
        content = archive.content
        return weights, content.get("config") if _is_checkpoint(content) else None


def read_checkpoint_content(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint of train.py, floats as float32; None for another file."""
    try:
        archive = Archive(path)
    except Exception:  # `read_file` says what it is
        return None
    if not _is_checkpoint(archive.content):
        return None
    with _intact():
        return archive.filled(archive.content)


@contextmanager
def _intact() -> Iterator[None]:
    """Turn any error within, while a file is read, into an `InputError`: the file is damaged."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file can break its reader in any way
        reason = one_line(error) or type(error).__name__
        raise InputError(f"truncated or damaged ({reason}); download it anew") from None


class Archive:
    """A mapped archive of `torch.save` or `torch.jit.save`. Its `content` has `PlainTensor`s."""

    def __init__(self, path: Path):
        with path.open("rb") as opened:
            self.file = file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self.records, self.claimed = {}, 0  # bytes of all tensors so far
        for info in zipfile.ZipFile(file).infolist():
            lengths = struct.unpack_from("<HH", file, info.header_offset + 26)  # of name and extra
            start = info.header_offset + 30 + sum(lengths)
            record = memoryview(file)[start:][: info.file_size]
            self.records[info.filename.partition("/")[2]] = record
        if "data.pkl" not in self.records:
            raise InputError("an archive without data.pkl, so not torch's; if the weights file is "
                             "in it, unpack it")  # fmt: skip
        self.content = PlainUnpickler(bytes(self.records["data.pkl"])).load()
        self.is_script = "constants.pkl" in self.records
        if self.is_script:
            self.content = dict(self.content.tensors())

    def tensor(self, plain: PlainTensor) -> Tensor:
        """A tensor in memory of its own, floats as float32."""
        key, dtype, (offset, size, stride, *_) = plain
        data = self.records[f"data/{key}"] or bytearray(8)  # torch refuses an empty buffer
        numbers = torch.frombuffer(data, dtype=dtype).as_strided(size, stride, offset)
        self.claimed += numbers.numel() * numbers.itemsize
        if self.claimed > len(self.file):  # a damaged stride of 0 repeats a number at will
            raise InputError(f"its tensors claim more than its {len(self.file):,} bytes")
        copy = numbers.to(torch.float32 if dtype.is_floating_point else dtype, copy=True)
        if hasattr(self.file, "madvise"):  # the file's numbers leave the memory again
            self.file.madvise(mmap.MADV_DONTNEED)
        return copy

    def filled(self, value: Any) -> Any:
        """`value` with tensors in place of `PlainTensor`s."""
        if isinstance(value, PlainTensor):
            return self.tensor(value)
        if isinstance(value, dict):
            return {key: self.filled(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self.filled, value))
        return value


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict of the CLIP in `content`: names of weights to `Tensor` or `PlainTensor`. It
    may be within dicts of any names (`state_dict`, `model`, `ema`), or a module pickled whole; its
    names may have a prefix and `INSERTED` parts. Raises `InputError` if there are several CLIPs."""
    if not isinstance(content, dict):
        raise InputError(f"holds {type(content).__name__}, not a state dict; save one")
    tensors = _tensors(content["model"] if _is_checkpoint(content) else content)
    images, texts = _prefixes(tensors, IMAGE_MARKS), _prefixes(tensors, TEXT_MARKS)
    texts |= {prefix.removesuffix(OWN_TEXT) for prefix in texts} & images
    # The logit scale marks a model with other towers, which open_clip builds.
    clips = images & texts or _prefixes(tensors, ("logit_scale",)) or images | texts or {""}
    if len(clips) > 1:
        names = one_line(", ".join(sorted(p.rstrip(".") or "the file itself" for p in clips)))
        raise InputError(f"holds {len(clips)} CLIP models ({names}); save the one you want alone")
    (prefix,) = clips
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    weights = {name.removeprefix(OWN_TEXT): tensor for name, tensor in weights.items()}
    return {n: tensor for n, tensor in weights.items() if n.split(".")[-1] not in NO_WEIGHTS}


def _is_checkpoint(content: Any) -> bool:
    """Whether this is a checkpoint of train.py, which may hold an average besides the model."""
    return isinstance(content, dict) and {"format", "arguments", "model"} <= content.keys()


def _tensors(content: dict) -> dict[str, Any]:
    """The tensors in nested dicts and modules, by their names joined with dots."""
    found, seen, waiting = {}, set(), [("", content)]
    for name, value in waiting:  # which grows
        if isinstance(value, Tensor | PlainTensor):
            found[name] = value
        elif isinstance(value, dict) and id(value) not in seen:  # one may have two names
            seen.add(id(value))
            if isinstance(value, PlainObject) and value.is_module:
                value = dict(value.tensors())
            parts = {key: part for key, part in value.items() if isinstance(key, str)}
            plain = {INSERTED.sub("", key): part for key, part in parts.items()}
            if len(plain) == len(parts):  # else the inserted parts tell two models apart
                parts = plain
            start = f"{name}." if name else ""
            waiting += [(start + key, part) for key, part in parts.items()]
    return found


def _prefixes(names: Iterable[str], marks: tuple[str, ...]) -> set[str]:
    """What comes before the marks of a tower in names."""
    return {n.removesuffix(mark) for n in names for mark in marks if f".{n}".endswith(f".{mark}")}


def _is_safetensors(path: Path) -> bool:
    """Whether a file is .safetensors, else an archive. Raises `InputError` for another file."""
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # first, because the header's length before it can be any bytes
        return True
    if start.startswith(b"PK\3\4"):
        return False
    if start.startswith(b"\x80"):
        raise InputError("a bare pickle, as of torch before 1.6; save it anew with torch.save")
    raise InputError(
        f"{describe(path)}, not weights; download it anew, as .safetensors, .bin, .pt or .pth"
    )
