"""Answers for other programs: a row an image, in a CSV or, by the file's ending, in JSON lines."""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from utils.runs.files import atomic_write, writing


def write_answers(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows with the same keys, one after the other. In a CSV each key of a dictionary has a
    column of its own, "key: key in it", and a list is joined by " | "."""
    with (
        writing(file),
        atomic_write(file) as temporary,  # names of files need not be valid UTF-8
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream,
    ):
        if file.suffix.lower() == ".jsonl":
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.writer(stream)
        for number, row in enumerate(map(_flat, rows)):
            if number == 0:
                writer.writerow(row)
            writer.writerow(row.values())


def _flat(row: Mapping[str, object]) -> dict[str, object]:
    flat = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}: {name}": number for name, number in value.items()}
        else:
            flat[key] = " | ".join(value) if isinstance(value, list) else value
    return flat
