"""What the fuzzers feed: each target takes any bytes, and fails on all but what is promised.

A target writes its bytes to `path`, since the readers take files.
"""

import io
import json
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import torch
from published import save_published

from models.errors import InputError
from models.weights.read import read_file
from utils.data.annotations import read_annotations

LONGEST_MESSAGE = 1000  # characters
RECORD = bytes(range(64))


def weights(data: bytes, path: Path) -> None:
    """Any file is weights no larger than it (twice that as float32) or refused in one line."""
    path.write_bytes(data)
    try:
        state_dict, _ = read_file(path)
    except InputError as error:
        message = str(error)
        assert message.isprintable() and len(message) <= LONGEST_MESSAGE, message
        return
    assert sum(tensor.nbytes for tensor in state_dict.values()) <= 2 * len(data)
    for tensor in state_dict.values():
        tensor.sum()


def weights_within(data: bytes, path: Path) -> None:
    """As `weights`; the first byte says what the others are, so that mutations get past the checks
    of the outer format: a whole file, or a pickle or header in a file that is otherwise right."""
    kind, content = data[:1], data[1:]
    if kind in (b"p", b"j"):
        weights(zipped(content, is_script=kind == b"j"), path)
    elif kind == b"s":
        weights(safetensors(content), path)
    else:
        weights(content, path)


def annotations(data: bytes, path: Path) -> None:
    """Any file is captions of images below the data folder, or refused with its name."""
    path.write_bytes(data)
    try:
        pairs = read_annotations(path)
    except InputError as error:
        assert str(error).startswith(str(path)), str(error)
        return
    for image, captions in pairs:
        assert ".." not in PurePosixPath(image).parts and not PurePosixPath(image).is_absolute()
        assert captions and all(caption.strip() for caption in captions)


def zipped(pickled: bytes, is_script: bool) -> bytes:
    """An archive of `torch.save`, or of `torch.jit.save`."""
    records = {"data.pkl": pickled, "data/0": RECORD, "byteorder": b"little"}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (records | ({"constants.pkl": b""} if is_script else {})).items():
            archive.writestr(zipfile.ZipInfo(f"a/{name}"), content)
    return file.getvalue()


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + RECORD


def weights_seeds() -> list[bytes]:
    """Small files of every kind, and parts for `weights_within` to wrap."""
    numbers = torch.arange(16.0)  # as many as RECORD holds
    state_dict = {"a.weight": numbers.view(2, 8), "a.bias": numbers[:2]}
    checkpoint = {"model": state_dict, "optimizer": {"betas": (0.9, 0.999), "n": [2**40, True]}}
    with tempfile.TemporaryDirectory() as folder:
        files = [save_published(state_dict, Path(folder) / "p.pt").read_bytes()]
    for content in (state_dict, checkpoint):
        file = io.BytesIO()
        torch.save(content, file)
        files.append(file.getvalue())
    header = b'{"a":{"dtype":"F32","shape":[2,8],"data_offsets":[0,64]},"__metadata__":{"b":"c"}}'
    parts = [b"s" + header]
    for file in files:
        pickled = data_pickle(file)
        parts += [kind + pickled for kind in (b"p", b"j")]
    return [b"f" + file for file in [*files, safetensors(header)]] + parts


def data_pickle(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("/data.pkl")))


def annotations_seeds() -> list[bytes]:
    entries = [
        {"image": "images\\1.jpg", "caption": ["a dog", "两只狗 \u00e9\U0001f415"]},
        {"image": "images/2.jpg", "caption": "one string", "id": 1.5e3, "x": [None, True, {}]},
    ]
    text = json.dumps(entries, ensure_ascii=False)
    return [
        json.dumps(entries, indent=1).encode(),
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        b"".join(json.dumps(entry).encode() + b"\n" for entry in entries),
        'image,caption\r\na.jpg,"one, ""two"""\r\nb/c.jpg,\u4e24\r\n'.encode(),
        b"file_name\ttitle\nimages\\1.jpg\ta dog\n",
        b'{"images": [{"id": 1, "file_name": "a.jpg"}], '
        b'"annotations": [{"image_id": 1, "caption": "x"}]}',
        b'[{"image": "../a", "caption": []}, {"image": "C:\\\\a.jpg", "caption": [" "]}, 3, NaN]',
    ]


TARGETS = {
    "weights": (weights_within, weights_seeds),
    "annotations": (annotations, annotations_seeds),
}
