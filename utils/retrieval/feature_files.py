"""Files of features for other programs: `.npy` with the names in a text file, or `.parquet`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.runs.files import atomic_write, writing

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
    rows = F.normalize(features.float(), dim=-1).cpu().numpy()
    n, d = rows.shape
    with writing(file), atomic_write(file) as temporary:
        if file.suffix.lower() == ".parquet":
            import pyarrow
            from pyarrow.parquet import write_table

            lists = pyarrow.FixedSizeListArray.from_arrays(rows.ravel(), d)
            write_table(pyarrow.table({"name": names, "feature": lists}), temporary)
            return READ_PARQUET.format(file=str(file), n=n, d=d)
        with temporary.open("wb") as stream:  # given a path, numpy would add an ending
            np.save(stream, rows)
    names_file = file.with_suffix(".names.txt")
    with writing(names_file), atomic_write(names_file) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return READ_NPY.format(file=str(file), names=str(names_file), n=n, d=d)
