"""Captions in the formats in which people have them, written as their programs write them."""

import csv
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from utils.data.annotations import annotations_json

Pairs = list[tuple[str, list[str]]]


def write_tar(file: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def as_list(pairs: Pairs) -> str:
    return annotations_json(pairs).decode()


def as_list_of_single_captions(pairs: Pairs) -> str:
    """Image after image in turns, so that those of one image do not stand together."""
    rows = [
        {"image": image, "caption": captions[turn]}
        for turn in range(max(len(captions) for _, captions in pairs))
        for image, captions in pairs
        if turn < len(captions)
    ]
    return json.dumps(rows, ensure_ascii=False)


def as_json_lines(pairs: Pairs) -> str:
    """The metadata.jsonl of a Hugging Face image folder."""
    rows = [{"file_name": image, "text": text} for image, texts in pairs for text in texts]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_coco(pairs: Pairs) -> str:
    images = [{"id": 7 * i, "file_name": image, "width": 3} for i, (image, _) in enumerate(pairs)]
    annotations = [
        {"id": i, "image_id": 7 * row, "caption": text}
        for row, (_, texts) in enumerate(pairs)
        for i, text in enumerate(texts)
    ]
    unseen = {"id": "x", "file_name": "no captions.jpg"}
    content = {"info": {"year": 2014}, "images": [unseen, *images], "annotations": annotations}
    return json.dumps(content, ensure_ascii=False)


def table(pairs: Pairs, header: list[str], **dialect) -> str:
    """As Python's and pandas' writers make it; a column that is not asked for is in front."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, **dialect)
    writer.writerow(["", *header])
    rows = [(image, text) for image, texts in pairs for text in texts]
    writer.writerows([str(number), *row] for number, row in enumerate(rows))
    return file.getvalue()


def as_csv(pairs: Pairs) -> str:
    return table(pairs, ["image", "caption"])


def as_csv_of_excel(pairs: Pairs) -> str:
    """Where the comma is the decimal sign; every field in quotes, a header typed by hand, and rows
    that were emptied."""
    header = [" Image ", "Caption "]
    return table(pairs, header, delimiter=";", quoting=csv.QUOTE_ALL) + ";;\r\n\r\n"


def as_tsv(pairs: Pairs) -> str:
    """open_clip's default columns."""
    return table(pairs, ["filepath", "title"], delimiter="\t", lineterminator="\n")


FORMATS = {
    "list": (as_list, "json"),
    "list of single captions": (as_list_of_single_captions, "json"),
    "JSON lines": (as_json_lines, "jsonl"),
    "JSON lines called .json": (as_json_lines, "json"),
    "COCO": (as_coco, "json"),
    "CSV": (as_csv, "csv"),
    "CSV of Excel": (as_csv_of_excel, "csv"),
    "TSV": (as_tsv, "tsv"),
}
