"""Command-line values."""

import argparse
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from utils.runs import arguments
from utils.runs.arguments import (
    answer_file,
    feature_file,
    integer,
    name_or_path,
    number,
    path,
    positive,
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


@pytest.mark.parametrize(
    "parse, name, message",
    [
        (answer_file, "a.xlsx", r"a.xlsx: name a file that ends in .csv or .jsonl"),
        (feature_file, "a", r"a: name a file that ends in .npy or .parquet"),
        (feature_file, "a.parquet", r"a.parquet: needs pyarrow \(pip install pyarrow\); or name"),
        (feature_file, "folder.npy", r"folder.npy: is a folder"),
    ],
)
def test_a_file_in_no_format_to_write_is_refused(tmp_path, monkeypatch, parse, name, message):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(name)


def test_paths_of_the_home_folder_and_paths_that_are_none(tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert path("~/a b") == tmp_path / "a b"
    assert name_or_path("~/weights.pt") == str(tmp_path / "weights.pt")
    for parse in (path, name_or_path):
        for text in ("", " "):
            with pytest.raises(argparse.ArgumentTypeError, match="is empty"):
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
