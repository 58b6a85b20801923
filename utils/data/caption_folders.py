"""Folders that hold images with their captions, without a list: a table of their forms.

tar shards       `00000.tar` with `0001.jpg` beside `0001.txt`, or `0001.json` with a caption, as
                 img2dataset and webdataset write them
datasets         what `save_to_disk` of Hugging Face's `datasets` writes
texts            `1.jpg` beside `1.txt`, whose lines are captions
class folders    a folder of images for each class; templates make the captions
"""

import json
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

from models.files import decoded
from utils.data.caption_formats import CAPTION_FIELDS, SPLIT_WORDS, Record, first_of
from utils.data.class_folders import class_folders, words_of
from utils.data.containers import arrow_table, image_column, index_of, read_contained
from utils.data.templates import TEMPLATE_SETS

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # of images beside a text
# More templates hardly tell a model more, and a million images would have 38 million captions.
TEMPLATES = {"en": TEMPLATE_SETS["ensemble"][:5], "cn": TEMPLATE_SETS["cn_ensemble"][:5]}
Records = Callable[[Path, str], Iterator[Record]]  # of a folder and a language; images below it


def folder_records(folder: Path, language: str) -> Iterator[Record] | None:
    """The records of a folder; None if it holds no images with captions."""
    for is_in, records in FORMS:
        if folder.is_dir() and is_in(folder):
            return records(folder, language)
    return None


def why_no_form(folder: Path) -> str:
    classes = class_folders(folder)
    only = f"only one class folder, {classes[0].name}" if len(classes) == 1 else "no class folders"
    return (
        f"{folder}: no captions: there are neither tar shards nor 1.txt beside 1.jpg, and {only}; "
        "captions are made from at least two"
    )


def _of_shards(folder: Path, _: str) -> Iterator[Record]:
    for shard in sorted(folder.glob("*.tar")):
        yield from shard_records(shard)


def shard_records(shard: Path) -> Iterator[Record]:
    """The records of a tar's samples."""
    samples: dict[str, dict[str, str]] = {}  # {key: {ending: member}}
    places = index_of(shard)
    for member in places:
        path = PurePosixPath(member)
        if path.name.startswith("."):  # a Mac's notes on a file
            continue
        key, _, ending = path.name.partition(".")
        samples.setdefault(str(path.with_name(key)), {})[f".{ending}".lower()] = member
    for key, members in samples.items():
        where = f"{shard.name}/{key}"
        try:
            image, ending = endings_of(members)
            name = members[ending]
            text = decoded(read_contained(shard, name, places[name]), name)
            caption = caption_of(text, ending)
            yield Record(where, {"image": f"{shard.name}/{members[image]}", "caption": caption})
        except ValueError as error:
            yield Record(where, None, str(error))


def endings_of(sample: Collection[str]) -> tuple[str, str]:
    """Of a sample's endings, those of its image and of its text. Raises `ValueError`."""
    image, text = first_of(ENDINGS, sample), first_of((".txt", ".json"), sample)
    if image and text:
        return image, text
    raise ValueError(f"should be an image beside a .txt or a .json; it has {', '.join(sample)}")


def caption_of(text: str, ending: str) -> object:
    """The caption in the text of a sample. Raises `ValueError`."""
    if ending == ".txt":
        return text
    try:
        content = json.loads(text)
        return content[first_of(CAPTION_FIELDS, content)]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError('its .json should hold {"caption": ...}') from None


def _of_datasets(folder: Path, _: str) -> Iterator[Record]:
    for file in sorted(folder.glob("*.arrow")):
        yield from table_records(file)


def table_records(file: Path) -> Iterator[Record]:
    """The records of an Arrow or a Parquet file, of which some hold the images themselves."""
    table = arrow_table(file)
    contained = image_column(table)
    rows = table.drop_columns([contained]) if contained else table
    rows = rows.rename_columns([name.strip().casefold() for name in rows.column_names])
    number = 0
    for batch in rows.to_batches():
        for row in batch.to_pylist():
            image = {"image": f"{file.name}/{number}"} if contained else {}
            yield Record(f"row {number}", row | image)
            number += 1


def _of_texts(folder: Path, _: str) -> Iterator[Record]:
    from utils.data.image_files import find_images  # torch takes seconds

    for image in find_images(folder):
        text = (folder / image).with_suffix(".txt")
        if text.is_file():
            captions = re.split(r"\r?\n", decoded(text.read_bytes(), text).strip())
            yield Record(str(image), {"image": image.as_posix(), "caption": captions})
        else:
            yield Record(str(image), None, f"no {text.name} beside it")


def _has_texts(folder: Path) -> bool:
    endings = (*ENDINGS, *map(str.upper, ENDINGS))  # cameras write the latter
    return any(text.with_suffix(end).is_file() for text in folder.rglob("*.txt") for end in endings)


def _has_classes(folder: Path) -> bool:
    names = {found.name.lower() for found in class_folders(folder)}
    return len(names) > 1 and not names <= SPLIT_WORDS.keys()


def _of_classes(folder: Path, language: str) -> Iterator[Record]:
    from utils.data.image_files import find_images

    folders = class_folders(folder)
    for found, name in zip(folders, words_of([f.name for f in folders]), strict=True):
        captions = [template.format(name) for template in TEMPLATES[language]]
        for image in find_images(found):
            path = f"{found.name}/{image.as_posix()}"
            yield Record(path, {"image": path, "caption": captions})


FORMS: tuple[tuple[Callable[[Path], bool], Records], ...] = (
    (lambda folder: any(folder.glob("*.tar")), _of_shards),
    (lambda folder: any(folder.glob("*.arrow")), _of_datasets),
    (_has_texts, _of_texts),
    (_has_classes, _of_classes),
)
