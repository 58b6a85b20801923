"""Pipes, devices and huge files are refused: they neither block a program nor fill the memory."""

import os
import sys

import pytest

import predict
from flickr8k.prepare import prepare
from flickr8k.sources import find_files
from models import run_files
from models.clip_utils import find_weights
from models.errors import InputError
from models.files import LARGEST, read_bytes, read_lines
from utils.data.annotations import read_annotations, refuse_another_set
from utils.runs.checkpoint import read_checkpoint

READERS = {
    "captions_file": lambda path: predict.read_captions(path, "weights.pth"),
    "annotations": read_annotations,
    "another set": lambda path: refuse_another_set({path: b"[]"}),
    "weights": find_weights,
    "source": lambda path: find_files([path], open_zips=None),
}


@pytest.fixture(params=["pipe", "device"])
def no_file(request, tmp_path):
    path = tmp_path / "no_file.json"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_are_refused_by_name(no_file, reader):
    with pytest.raises(InputError) as error:
        READERS[reader](no_file)
    assert str(error.value) == f"{no_file}: is a pipe or a device, not a file; name a file"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
def test_a_checkpoint_or_the_arguments_of_a_run_are_files_too(no_file):
    assert read_checkpoint(no_file) is None  # `find_weights` is asked next
    weights = no_file.parent / "weights" / "last.pth"
    weights.parent.mkdir()
    weights.touch()
    no_file.rename(no_file.parent / "arguments.json")
    assert run_files.trained_on(weights) is None


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="the file would take the room it claims")
@pytest.mark.parametrize("reader", ["captions_file", "annotations", "another set"])
def test_files_too_large_to_be_read_whole_are_refused_with_their_size(tmp_path, reader):
    path = sparse(tmp_path / "large.json", LARGEST + 1)
    with pytest.raises(
        InputError, match=r"^\S+large\.json: 1,074 MB, where at most 1,074 MB are read"
    ):
        READERS[reader](path)


@pytest.mark.skipif(sys.platform == "win32", reason="the file would take the room it claims")
def test_a_source_that_is_too_large_is_refused(tmp_path):
    source = sparse(tmp_path / "dataset_flickr8k.json", 2 * LARGEST)
    with pytest.raises(InputError, match=r"flickr8k\.json: 2,147 MB, where at most"):
        prepare(tmp_path / "output", [source])


def test_files_are_read_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"four")
    assert read_bytes(path, 4) == b"four"
    with pytest.raises(InputError, match="at most"):
        read_bytes(path, 3)
    with pytest.raises(InputError, match="is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "absent")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_line_ends_of_text_files_end_a_line(tmp_path, end):
    """Those of Unix, Windows and the old Mac; U+2028 comes from web pages, U+000B from Word."""
    lines = [f"a{separator}dog" for separator in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    file = tmp_path / "captions.txt"
    file.write_bytes(f"{end.join(lines)}{end}{end} last ".encode())
    assert read_lines(file, "caption") == [*lines, "last"]
