"""Files of features for other programs: `.npy` with the names in a text file, or `.parquet`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.runs.files import atomic_write, writing

BLOCK = 2**14  # features that are float32 at a time

READ_NPY = """\
  import numpy as np
  features = np.load({file!r})  # float32 [{n}, {d}], of length 1
  names = open({names!r}, encoding="utf-8").read().splitlines()"""
READ_PARQUET = """\
  import numpy as np, pyarrow.parquet
  table = pyarrow.parquet.read_table({file!r})  # [{n}, {d}], of length 1
  names, features = table["name"].to_pylist(), np.stack(table["feature"].to_numpy())"""


def write_features(file: Path, names: Sequence[str], features: Tensor) -> str:
    """Write features `[n, d]` as float32 of length 1, with their names: in a `.parquet`, or in a
    `.npy` and a `.names.txt`. Return the lines of Python that read them. Ends of lines in a name
    become blanks; bytes that are not UTF-8 are escaped."""
    names = [" ".join(n.encode(errors="backslashreplace").decode().splitlines()) for n in names]
    n, d = features.shape
    with writing(file), atomic_write(file) as temporary:
        if file.suffix.lower() == ".parquet":
            _write_parquet(temporary, names, features)
            return READ_PARQUET.format(file=str(file), n=n, d=d)
        _write_npy(temporary, features)
    names_file = file.with_suffix(".names.txt")
    with writing(names_file), atomic_write(names_file) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return READ_NPY.format(file=str(file), names=str(names_file), n=n, d=d)


def _blocks(features: Tensor) -> Iterator[np.ndarray]:
    for block in features.split(BLOCK):
        yield F.normalize(block.float(), dim=-1).cpu().numpy()


def _write_npy(file: Path, features: Tensor) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(features.shape)}
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for block in _blocks(features):
            stream.write(block.tobytes())


def _write_parquet(file: Path, names: list[str], features: Tensor) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    d = features.shape[1]
    types = {"name": pyarrow.string(), "feature": pyarrow.list_(pyarrow.float32(), d)}
    schema = pyarrow.schema(types.items())
    with ParquetWriter(file, schema) as writer:
        for number, block in enumerate(_blocks(features)):
            own = names[number * BLOCK : (number + 1) * BLOCK]
            lists = pyarrow.FixedSizeListArray.from_arrays(block.ravel(), d)
            writer.write_table(pyarrow.table([own, lists], schema=schema))
