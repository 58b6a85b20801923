"""Caption formats: a list, JSON lines, COCO, CSV and TSV, told apart by their content."""

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import PurePath
from typing import NamedTuple

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# Names of a column or a field; where a file has several of them, the first counts.
IMAGE_FIELDS = ("image", "file_name", "filename", "filepath", "image_name")
CAPTION_FIELDS = ("caption", "captions", "text", "title", "comment")
SPLITS = {"train": "training", "val": "validation", "test": "test"}  # in names of files; in words
SPLIT_FIELDS = ("split", "subset")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SEPARATORS = "\t,;|"
LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
LIST = re.compile(rf"\[\s*(?:(?:{LITERAL.pattern})[,\s]*)+\]", re.DOTALL)
BLANK = re.compile(r"\s*")
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
SHOULD_HOLD = 'it should hold [{"image": ..., "caption": ...}, ...]'
NO_LIST = f"is not a list; {SHOULD_HOLD}"
SHOWN = 80  # characters of a line that a message quotes


class Record(NamedTuple):
    """One entry of a file."""

    where: str  # "entry 3" (from 0), "line 7" (from 1)
    content: object  # usually `{"image": ..., "caption": ...}`
    problem: str | None = None  # of reading it


class UnknownFormat(ValueError):
    """A file is broken, or of another format; the message says what it looks like."""


def read_records(text: str, suffix: str = "") -> Iterator[Record]:
    """The records of a file with this content, in their order; `suffix` is that of its name.

    list        `[{"image": "1.jpg", "caption": ["...", ...]}, ...]`
    object      `{"1.jpg": "...", "2.jpg": ["...", ...], ...}`
    JSON lines  such an object on every line
    COCO        `{"images": [{"id": 7, "file_name": "1.jpg"}, ...],
                "annotations": [{"image_id": 7, "caption": "..."}, ...]}`
    table       CSV or TSV: the first line names the columns; a row has a caption, or a list of them
                as Python, JSON or numpy writes it. Commas, tabs, semicolons or bars separate fields

    Raises `UnknownFormat`.
    """
    if not text.strip():
        raise UnknownFormat("is empty; get a new copy, or write it anew")
    if "\0" in text:
        raise UnknownFormat("holds NUL bytes; save it as UTF-8")
    start = text[BLANK.match(text).end()]
    if start == "[":
        yield from _list_records(text)
    elif start == "{":
        yield from _json_records(text, suffix)
    elif rows := _table(text):
        yield from rows
    elif suffix in (".json", ".jsonl"):
        _parsed(text)
        raise UnknownFormat(NO_LIST)
    else:
        first = text.lstrip().partition("\n")[0].rstrip()
        raise UnknownFormat(
            "the first line should name the columns, image and caption, separated by a comma or a "
            f"tab; it is {first[:SHOWN]!r}"
        )


def _list_records(text: str) -> Iterator[Record]:
    """The records of a JSON list, entry by entry, which takes less memory than all at once."""
    decode = json.JSONDecoder().raw_decode
    place, number = BLANK.match(text).end(), 0
    try:
        while text[place] == ("," if number else "["):
            entry, end = decode(text, BLANK.match(text, place + 1).end())
            yield Record(f"entry {number}", entry)
            place, number = BLANK.match(text, end).end(), number + 1
        is_whole = text[place] == "]" and not text[place + 1 :].strip()
    except (RecursionError, ValueError, IndexError):
        is_whole = False
    if not is_whole:
        _parsed(text)  # raises an error that names the place
        raise UnknownFormat(f"lists no images; {SHOULD_HOLD}")


def _json_records(text: str, suffix: str) -> Iterator[Record]:
    try:
        content = _parsed(text)
    except UnknownFormat:
        lines = _json_lines(text)
        first = next(lines)
        if suffix != ".jsonl" and not isinstance(first.content, dict):
            raise
        return chain([first], lines)
    images, annotations = content.get("images"), content.get("annotations")
    if isinstance(images, list) and isinstance(annotations, list):
        return _coco_records(images, annotations)
    if first_of(IMAGE_FIELDS, content):
        return iter([Record("line 1", content)])
    if content and all(PurePath(key).suffix for key in content):
        pairs = json.loads(text, object_pairs_hook=list)  # a key may be repeated
        return (Record(f"image {key:.80}", {"image": key, "caption": text}) for key, text in pairs)
    raise UnknownFormat(NO_LIST)


def _json_lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                yield Record(f"line {number}", _parsed(line.rstrip(), is_line=True))
            except UnknownFormat as error:
                yield Record(f"line {number}", None, str(error))


def _lines(text: str) -> Iterator[str]:
    """The lines, which `io.StringIO` would give too, but with four bytes for each character."""
    return (line[0] for line in LINE.finditer(text))


def chinese_clip_records(text: str, images: str) -> Iterator[Record]:
    """The records of Chinese-CLIP's texts, a JSON object a line with a text and the ids of images,
    which are in base64 in the table `images`."""
    for record in _json_lines(text):
        entry = record.content
        if not isinstance(entry, dict) or not isinstance(entry.get("image_ids"), list):
            problem = record.problem or 'should be {"text": ..., "image_ids": [...]}'
            yield record._replace(problem=problem)
            continue
        for image in entry["image_ids"]:
            content = {"image": f"{images}/{image}", "caption": entry.get("text")}
            yield record._replace(content=content)


def _parsed(text: str, is_line: bool = False) -> object:
    """The value of a JSON text. Raises `UnknownFormat` with the broken place and the remedy."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if is_line else f"line {error.lineno}, column {error.colno}"
        is_path = error.msg.startswith("Invalid \\escape")
        remedy = "; write / in paths, or \\\\ for \\" if is_path else ""
        raise UnknownFormat(f"broken JSON at {where}: {error.msg}{remedy}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of 5,000 digits
        raise UnknownFormat(f"broken JSON: {error}") from None


def _coco_records(images: list, annotations: list) -> Iterator[Record]:
    names = {}
    for entry in images:
        if isinstance(entry, dict) and isinstance(entry.get("id"), (int, str)):
            names[entry["id"]] = entry.get("file_name")
    for number, entry in enumerate(annotations):
        image = entry.get("image_id") if isinstance(entry, dict) else None
        if isinstance(image, (int, str)) and image in names:
            yield Record(f"annotation {number}", {**entry, "image": names[image]})
        else:
            problem = '"image_id" is that of none of the images'
            yield Record(f"annotation {number}", entry, problem)


def _table(text: str) -> Iterator[Record] | None:
    """The rows of a table; None if no separator gives its first line both columns."""
    for separator in SEPARATORS:
        rows = csv.reader(_lines(text), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            names = [name.strip().casefold() for name in next(filter(None, rows), [])]
        except csv.Error:
            continue
        image, caption = first_of(IMAGE_FIELDS, names), first_of(CAPTION_FIELDS, names)
        if image and caption:
            return _rows(rows, names, caption)
    return None


def _rows(rows, names: list[str], caption: str) -> Iterator[Record]:
    """The records of the other rows of a `csv.reader` with columns `names`."""
    line = rows.line_num + 1
    try:
        for row in rows:
            where, line = f"line {line}", rows.line_num + 1
            row = [field.strip() for field in row]
            if len(row) == len(names) and any(row):
                content = dict(zip(names, row, strict=True))
                yield Record(where, content | {caption: _cell(content[caption])})
            elif any(row):
                problem = (
                    f"has {len(row)} fields, where the first line has {len(names)}; put quotes "
                    "around a caption that holds the separator"
                )
                yield Record(where, None, problem)
    except csv.Error as error:
        raise UnknownFormat(
            f"broken table from line {line} on ({error}); within quotes, write a quote twice"
        ) from None


def _cell(text: str) -> str | list[str]:
    """The captions of a list cell, or else the cell. Numpy puts no comma between texts, which
    Python would join."""
    if not LIST.fullmatch(text):
        return text
    with suppress(ValueError):
        return json.loads(text)
    with suppress(SyntaxError, ValueError):
        return [ast.literal_eval(literal) for literal in LITERAL.findall(text)]
    return text


def first_of(fields: Iterable[str], names: Iterable[str]) -> str | None:
    """The first of `fields` that is among `names`."""
    for field in fields:
        if field in names:
            return field
    return None
