"""Files that stand whole or not at all: long names, equal bytes, disks full at any byte."""

import contextlib
import csv
import io
import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from models.errors import InputError
from utils.retrieval.plots import plot_losses, save_figure
from utils.runs.checkpoint import read_checkpoint, save_checkpoint, write_csv, write_json
from utils.runs.files import TEMPORARY, atomic_write

LONGEST = 255  # bytes of a name, on all common file systems
CONTENT = {"arguments": {"lr": 0.1}, "model": {"a": torch.arange(3000.0)}, "rows": [1, "x"]}


@pytest.mark.parametrize("name", ["a" * LONGEST, "a" * 251 + ".png", "图" * 85, "a." + "b" * 253])
def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        assert temporary.name.startswith(TEMPORARY) and len(temporary.name) < 30
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(KeyError), atomic_write(tmp_path / name) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / name).read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_equal_content_is_saved_as_equal_bytes(tmp_path):
    files = [tmp_path / name for name in ("checkpoint.pth", "another name")]
    for file in files:
        save_checkpoint(file, **CONTENT)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.load(files[1], weights_only=True)["rows"] == [1, "x"]


@contextlib.contextmanager
def room_for(size):
    """A disk that takes `size` bytes a file; the system says then that the file is too large."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def figure(n):
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, n])
    return drawn


ROWS = [{"epoch": n, "train_loss": 0.5} for n in range(20)]
WRITERS = {  # how each file is written in a version, and what it holds when it is read back
    "checkpoint.pth": (
        lambda path, n: save_checkpoint(path, version=n, **CONTENT),
        lambda path: read_checkpoint(path)["version"],
    ),
    "metrics.csv": (
        lambda path, n: write_csv(path, [{**row, "version": n} for row in ROWS]),
        lambda path: {int(row["version"]) for row in csv.DictReader(io.StringIO(path.read_text()))},
    ),
    "arguments.json": (
        lambda path, n: write_json(path, {"version": n, "list": list(range(50))}),
        lambda path: json.loads(path.read_text())["version"],
    ),
    "plot.png": (
        lambda path, n: save_figure(figure(n), path),
        lambda path: Image.open(path).tobytes(),
    ),
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_full_at_any_byte_is_one_line_and_keeps_what_stood_there(tmp_path, name):
    write, read = WRITERS[name]
    file = tmp_path / name
    write(file, 1)
    size, first = file.stat().st_size, read(file)
    for room in sorted({*range(0, size, max(1, size // 10)), 1, 2, 7, size - 1}):
        with pytest.raises(InputError) as error, room_for(room):
            write(file, 2)
        message = str(error.value)
        assert message.startswith(f"{file}: cannot be written (") and "\n" not in message
        assert "Make room" in message and read(file) == first
        assert list(tmp_path.iterdir()) == [file]
    with room_for(2 * size):
        write(file, 2)
    assert read(file) != first


names = st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=9)


@settings(max_examples=25)
@given(st.lists(st.dictionaries(names, st.integers()), min_size=1).filter(any))
def test_a_table_has_the_columns_of_all_its_rows(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "table.csv"
    write_csv(file, rows)
    with file.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    full = [row for row in rows if row]  # the csv module skips a line without anything in it
    kept = [{k: int(v) for k, v in row.items() if v} for row in found]
    assert [row for row in kept if row] == full


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_records_of_a_full_disk_are_one_line(tmp_path):
    from utils.runs import records  # which takes seconds

    losses = records.Losses(tmp_path, [], plot_losses)
    row = {"epoch": 1, "train_loss": 1.0, "val_loss": 2.0}
    for room in (0, 1000):  # for a line of text; for that line, but not for the plot
        with pytest.raises(InputError, match="cannot be written"), room_for(room):
            losses.append(row)
    log = records.Log(tmp_path / "console.log", Namespace(patience=None))
    table = (tmp_path / "console.log").read_text()
    assert re.search(r"patience \|\s+None", table)
    log.write("before\n")
    with pytest.raises(InputError, match=r"console\.log: cannot be written"), room_for(0):
        log.write("after\n")
    assert (tmp_path / "console.log").read_text() == f"{table}before\n"
