"""Command-line values, and what is known of the run that weights come from."""

import argparse
import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from models.errors import InputError
from utils.runs.arguments import (
    TrainedOn,
    integer,
    name_or_path,
    number,
    path,
    positive,
    run_folder,
    trained_on,
    trained_weights,
    workers,
)

numbers = st.integers().map(str) | st.floats().map(repr) | st.text(max_size=5)
numbers |= st.sampled_from(
    ["nan", "inf", "-inf", "1e999", "9" * 400, "1e300", "1e-999", "0x10", "", " 3 ", "9" * 5000]
)
bounds = st.integers(-9, 9)


def taken(parse, text: str):
    """The value, or None with a message that holds the text and the range."""
    try:
        return parse(text)
    except argparse.ArgumentTypeError as error:
        assert str(error).startswith(f"{text:.60} is not ")
        return None


@given(text=numbers, minimum=bounds, span=st.integers(0, 9) | st.none())
def test_integers_are_taken_within_their_range_alone(text, minimum, span):
    maximum = 10**9 if span is None else minimum + span
    value = taken(integer(minimum) if span is None else integer(minimum, maximum), text)
    try:
        expected = int(text)
    except ValueError:
        assert value is None
    else:
        within = minimum <= expected <= maximum
        assert value == (expected if within else None)


@given(text=numbers, minimum=bounds, below=st.integers(1, 9) | st.just(10**9))
def test_numbers_are_taken_within_their_range_alone(text, minimum, below):
    try:
        expected = float(text)
    except ValueError:
        expected = math.nan
    value = taken(number(minimum, below), text)
    within = math.isfinite(expected) and minimum <= expected < below
    assert value == (expected if within else None)
    value = taken(positive, text)
    assert value == (expected if 0 < expected < 10**9 else None)


@pytest.mark.parametrize(
    "parse, text, wanted",
    [
        (integer(2), "1", "an integer from 2 to 1,000,000,000"),
        (integer(0, 9), "10", "an integer from 0 to 9"),
        (integer(1), "1" + "0" * 9 + "1", "an integer from 1 to 1,000,000,000"),
        (number(), "-0.1", r"a number of at least 0 and below 1,000,000,000"),
        (number(below=1), "1", "a number of at least 0 and below 1"),
        (positive, "0", r"a number above 0 and below 1,000,000,000"),
        (positive, "1e300", r"a number above 0 and below 1,000,000,000"),
        (workers, "1000000", "an integer from 0 to 256"),
    ],
)
def test_a_refusal_says_the_range(parse, text, wanted):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not {wanted}$"):
        parse(text)


def test_paths_of_the_home_folder_and_paths_that_are_none(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert path("~/a b") == tmp_path / "a b"
    assert name_or_path("~/weights.pt") == str(tmp_path / "weights.pt")
    for parse in (path, name_or_path):
        for text in ("", " ", "~nobody-at-all/x"):
            with pytest.raises(argparse.ArgumentTypeError, match=r"is empty|folder is unknown"):
                parse(text)


def test_a_run_stands_for_the_weights_that_it_chose(tmp_path):
    (tmp_path / "run" / "weights").mkdir(parents=True)
    assert trained_weights(f"{tmp_path / 'run'}") == str(tmp_path / "run")
    for name in ("best_epoch_weights.pth", "wise_ft_weights.pth"):
        file = tmp_path / "run" / "weights" / name
        file.touch()
        assert trained_weights(str(tmp_path / "run")) == trained_weights(str(file)) == str(file)


@given(text=st.text(min_size=1, max_size=9))
def test_names_are_left_as_they_are(text):
    """`ViT-B/32` is no path, whose slash Windows would turn."""
    assume(text.strip() and not text.startswith("~"))
    assert name_or_path(text) == trained_weights(text) == text


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "a run" / "weights" / "last.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_a_run_tells_what_its_weights_were_trained_on(weights):
    file = weights.parents[1] / "arguments.json"
    assert trained_on(weights) is run_folder(weights) is None
    file.write_text('{"dataset_path": "data", "language": "en"}')
    assert trained_on(weights) == TrainedOn(Path("data"), ["en"])
    file.write_text('{"dataset_path": "C:/数据", "language": ["cn", "en"]}', encoding="utf-8")
    assert trained_on(str(weights)) == TrainedOn(Path("C:/数据"), ["cn", "en"])
    assert run_folder(weights) == run_folder(weights.parents[1]) == weights.parents[1]
    assert trained_on(weights.parents[1]) == trained_on(weights)


def test_names_and_missing_files_are_of_no_run(weights, monkeypatch):
    """Even where the folder at that place is a run."""
    (weights.parents[1] / "arguments.json").write_text('{"dataset_path": "d", "language": "en"}')
    monkeypatch.chdir(weights.parents[1])
    assert run_folder("ViT-B/32") is trained_on("ViT-B/32") is None
    assert run_folder("weights/gone.pth") is None
    assert run_folder("weights/last.pth") == weights.parents[1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"language": "en"}', "\xff", "[" * 200_000])
def test_broken_arguments_of_a_run_are_named(weights, content):
    (weights.parents[1] / "arguments.json").write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=r"arguments\.json: should hold the dataset_path"):
        trained_on(weights)


anything = st.recursive(st.none() | st.integers() | st.text(), st.lists)


@given(dataset_path=anything, language=anything)
def test_any_values_of_a_run_are_taken_or_named(tmp_path_factory, dataset_path, language):
    run = tmp_path_factory.mktemp("run")
    (run / "weights").mkdir()
    (run / "weights" / "last.pth").touch()
    arguments = json.dumps({"dataset_path": dataset_path, "language": language})
    (run / "arguments.json").write_text(arguments)
    try:
        data = trained_on(run / "weights" / "last.pth")
    except InputError:
        return
    assert isinstance(data.dataset_path, Path)
    assert all(isinstance(name, str) for name in data.languages)
