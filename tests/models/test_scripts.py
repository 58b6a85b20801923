"""The parser that all scripts share, and what it takes for files to write."""

import os
from importlib import import_module

import pytest

from models.errors import InputError
from models.scripts import ArgumentParser, writable_file, writable_folder
from train import build_parser
from utils.runs.arguments import picture


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epoch", "3"], "--epoch: there is no such option; did you mean --epochs?"),
        (["--epoch=3"], "--epoch: there is no such option; did you mean --epochs?"),
        (["-epochs", "3"], "-epochs: there is no such option; did you mean --epochs?"),
        (
            ["--batch-size", "3"],
            "--batch-size: there is no such option; did you mean --batch_size?",
        ),
        (["--xyz"], "--xyz: there is no such option; --help lists them"),
        (["xyz"], "xyz: there is no such option; --help lists them"),
        (["--epochs"], "argument --epochs: expected one argument"),
    ],
)
def test_an_error_is_one_line(words, message):
    with pytest.raises(InputError) as error:
        build_parser().parse_args(words)
    assert str(error.value) == message


def test_help_comes_first_and_values_are_no_options(capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["--epoch", "3", "--help"])
    assert ended.value.code == 0 and "--epochs EPOCHS" in capsys.readouterr().out
    parser = ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", nargs="+")
    found = parser.parse_args(["--data", "x", "--text", "-- a dash", "-1", "- b"])
    assert found.text == ["-- a dash", "-1", "- b"]
    parser.add_argument("image")
    assert parser.parse_args(["--data", "x", "--", "--odd"]).image == "--odd"


@pytest.mark.parametrize(
    "script",
    ["train", "predict", "predict_zero_shot", "utils.metric", "utils.classification",
     "models.clip_utils", "models.convert", "flickr8k.prepare"],
)  # fmt: skip
def test_help_has_an_example_and_fits_a_terminal(script, monkeypatch, capsys):
    """Of 80 columns, as most are."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        import_module(script).main()
    lines = capsys.readouterr().out.splitlines()
    assert any(f"python {script.replace('.', '/')}.py " in line for line in lines)
    assert [line for line in lines if len(line) > 80] == []


def outputs():
    parser = ArgumentParser()
    parser.add_argument("--json", type=writable_file)
    parser.add_argument("--plot", type=picture)
    parser.add_argument("--output", type=writable_folder)
    return parser


@pytest.mark.parametrize("words", [["--json", "a/b/c.json"], ["--json", "a_file"], ["--plot", "x"],
                                   ["--plot", "new/x.PNG"], ["--output", "a/b"]])  # fmt: skip
def test_what_can_be_written_is_taken_and_nothing_is_made(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("kept")
    outputs().parse_args(words)
    assert list(tmp_path.iterdir()) == [tmp_path / "a_file"]
    assert (tmp_path / "a_file").read_text() == "kept"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--json", "a_folder"], "is a folder"),
        (["--json", os.devnull], "is a folder or a device"),
        (["--json", "a_file/x.json"], "cannot be written"),
        (["--plot", "m.txt"], "m.txt: no format for pictures; those are"),
        (["--plot", "a_file/m.png"], "cannot be written"),
        (["--output", "a_file/x/y"], "cannot be written"),
        (["--output", " "], "the path is empty"),
    ],
)
def test_what_cannot_be_written_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    with pytest.raises(InputError) as error:
        outputs().parse_args(words)
    assert f"argument {words[0]}: " in str(error.value) and message in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"a_file", "a_folder"}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="all may be written into")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match="cannot be written"):
        outputs().parse_args(["--json", str(tmp_path / "locked" / "new" / "x.json")])
