"""Answers in files, as the csv and json modules read them."""

import csv
import json
import os

import pytest

from utils.runs.answers import write_answers

ROWS = [
    {"image": 'a "dog", 狗.jpg', "labels": ["a", "b"], "score": {"a": 0.5, "b": 1e-9}},
    {"image": os.fsdecode(b"\xe4\xff.jpg"), "labels": [], "score": {"a": 1.0, "b": 0.0}},
]


def test_a_csv_has_a_column_for_each_key(tmp_path):
    write_answers(tmp_path / "a.csv", iter(ROWS))
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {"image": 'a "dog", 狗.jpg', "labels": "a | b", "score: a": "0.5",
                     "score: b": "1e-09"}  # fmt: skip
    assert second["image"] == "\\udce4\\udcff.jpg" and second["labels"] == ""


def test_json_lines_hold_the_rows(tmp_path):
    write_answers(tmp_path / "a.JSONL", iter(ROWS))
    lines = (tmp_path / "a.JSONL").read_text("utf-8").splitlines()
    assert list(map(json.loads, lines)) == ROWS


def test_a_file_stays_when_the_rows_end_in_an_error(tmp_path):
    def rows():
        yield ROWS[0]
        raise KeyboardInterrupt

    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_answers(tmp_path / "a.csv", rows())
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
