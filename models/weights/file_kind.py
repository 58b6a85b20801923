"""What a file is, in particular one that should have been another, in words that fit on a line."""

import re
import zipfile
from pathlib import Path

from models.errors import InputError

OTHER_PROGRAMS = {  # how their files start
    re.compile(rb"GGUF"): "a GGUF file (llama.cpp's)",
    re.compile(rb"\x89HDF\r\n"): "an HDF5 file (of Keras and TensorFlow)",
    re.compile(rb"\x08[\x01-\x1f][\x12\x1a\x3a]"): "an ONNX model",
}


def one_line(text: object) -> str:
    """Untrusted text as one printable line of at most 200 characters."""
    words = "".join(c if c.isprintable() else " " for c in f"{text!s:.1000}")
    return " ".join(words.split())[:200]


def describe(path: Path) -> str:
    """A few words on a file that is not what was wanted, with its size."""
    size = f"{path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        start = file.read(256)
    if start.startswith(b"PK\3\4") and _names_in_archive(path) is None:
        return f"an archive cut short at {size}"
    for pattern, program in OTHER_PROGRAMS.items():
        if pattern.match(start):
            return f"{program} of {size}"
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not start:
        return f"an empty file of {size}"
    if start.startswith((b"<!", b"<html", b"<head", b"<?xml")):
        return f"a web page of {size}, probably a server's error message"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {size} without the file itself (git lfs pull brings it)"
    return f"another file of {size}"


def weights_format(path: Path) -> str:
    """The format that a weights file starts like: "safetensors", "zip" (of `torch.save` or of
    TorchScript) or "legacy" (of `torch.save` before torch 1.6).

    Raises `InputError` that says what the file is instead; the caller names it.
    """
    if not path.is_file():
        raise InputError("is a folder, not a weights file; give a file in it")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":  # first: the length of the header, before it, can look like anything
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
    return any(name.endswith("/constants.pkl") for name in _names_in_archive(path) or [])


def _names_in_archive(path: Path) -> list[str] | None:
    """The names of the files in a zip archive; None if it is damaged, or no archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except OSError:
        raise
    except Exception:  # a damaged archive can break the reader in any way
        return None
