"""The captions of a data set: finding, reading and writing them."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory

from models.errors import InputError, listed, one_line
from models.files import decoded, probably_meant
from models.progress_bar import progress_bar
from models.scripts import from_here
from utils.data.caption_folders import folder_records, table_records, why_no_form
from utils.data.caption_formats import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    SPLIT_FIELDS,
    SPLIT_WORDS,
    SPLITS,
    SUFFIXES,
    Record,
    UnknownFormat,
    chinese_clip_records,
    first_of,
    read_records,
)
from utils.data.caption_lists import CaptionLists, Entries, join_parts
from utils.data.containers import cached_by_version
from utils.runs.files import atomic_write

CHINESE_CLIP = "_texts.jsonl"  # the end of its lists' names
PROBLEMS_SHOWN = 10  # of one caption file
NOTHING = {"", "nan", "none", "null", "<na>"}  # in place of a caption
PATH_LENGTH = 100  # characters shown of a path
# A path that `image_path` leaves as it is, found faster.
PLAIN_PATH = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)


def missing_annotations(file: Path) -> str | None:
    """Why the captions of `caption_file` are not found, and what is there instead, of its split if
    possible; None if they are there. Raises `InputError` for the only table, if it is broken."""
    root = file.parent
    if not root.is_dir():
        return f"{root}: {'is not a folder' if root.exists() else 'no such folder'}"
    if file.exists():
        return None
    split = file.stem.rpartition("_")[2]
    lists = sorted(f for f in root.iterdir() if f.suffix in SUFFIXES and f.is_file())
    if len(lists) == 1 and lists[0].stem.rpartition("_")[2] not in SPLITS:
        _list_parts(lists[0])
    others = [f.name for f in lists if f.stem.endswith(f"_{split}")] or [f.name for f in lists]
    told = f"{root}: no {file.name} in it" + (f", only {listed(others)}" if others else "")
    folders = {word: root / word for word in SPLIT_WORDS if (root / word).is_dir()}
    if own := [folder for word, folder in folders.items() if SPLIT_WORDS[word] == split]:
        return f"{told}; {why_no_form(own[0])}"
    for folder in folders.values():
        return (
            f"{told}, and no {split}/ beside {folder.name}/, whose images are split by python "
            f"{from_here('flickr8k/prepare.py')} --source {folder} --output {root}"
        )
    return told


def caption_file(root: Path, language: str, split: str) -> Path:
    """The captions of a language and a split in `root`: a list, `{language}_{split}.json` or of
    another suffix, or else in a form without a language: Chinese-CLIP's `{split}_texts.jsonl`, the
    only table in `root`, by its column split, or the folder `{split}` in a form of
    `caption_folders`. If there are none, the first list. Raises `InputError` for several lists."""
    lists = [root / f"{language}_{split}{suffix}" for suffix in SUFFIXES]
    found = [file for file in lists if file.is_file()]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{root}: {names} are of the same split; keep one of them")
    tables = [file for file in root.glob("*") if file.suffix in SUFFIXES]
    if found or any(file.stem.rpartition("_")[2] in SPLITS for file in tables):
        return found[0] if found else lists[0]
    words = [word for word, meant in SPLIT_WORDS.items() if meant == split]
    others = [root / f"{word}{CHINESE_CLIP}" for word in words]
    if len(tables) == 1:
        with suppress(InputError):  # of some other file
            if split in map(SPLIT_WORDS.get, _list_parts(tables[0])):
                others.append(tables[0])
    others += [folder for word in words if folder_records(folder := root / word, language)]
    return next((other for other in others if other.exists()), lists[0])


def read_annotations(path: Path, split: str | None = None, language: str = "en") -> CaptionLists:
    """The (image path relative to the folder of `path`, captions) pairs of the captions at `path`,
    as `caption_file` names it: a list in any format of `read_records`, whose name tells the split,
    a table with the column split, or a folder. One `InputError` names all problems."""
    if path.is_dir():
        records = folder_records(path, language)
        if records is None:
            raise InputError(why_no_form(path))
        parts = collect(path, records, lambda image: image_path(f"{path.name}/{image}"))
        return join_parts(parts.values())
    parts = _list_parts(path)
    name = path.stem.rpartition("_")[2]
    if split and name not in SPLITS and not path.name.endswith(CHINESE_CLIP):
        others = {word: len(part) for word, part in parts.items() if word not in SPLIT_WORDS}
        if others and split == "train":  # once
            print(
                f"warning: {path}: {sum(others.values())} images are left out, whose split is "
                f"{', '.join(word or 'empty' for word in others)}; splits are train, val and test"
            )
        return join_parts(part for word, part in parts.items() if SPLIT_WORDS.get(word) == split)
    if other := sorted(word for word in parts if SPLIT_WORDS.get(word, name) != name):
        print(
            f"warning: {path}: entries whose split is {', '.join(other)} count as {name}, as the "
            f"file's name says; python {from_here('flickr8k/prepare.py')} --source splits a file"
        )
    return join_parts(parts.values())


@cached_by_version(1)
def _list_parts(path: Path) -> dict[str, CaptionLists]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        records = table_records(path)
    elif path.name.endswith(CHINESE_CLIP):
        images = path.name.replace(CHINESE_CLIP, "_imgs.tsv")
        records = chinese_clip_records(_read_text(path), images)
    else:
        records = read_records(_read_text(path), suffix)
    return collect(path, records, image_path)


def collect(
    file: object, records: Iterable[Record], read_image: Callable[[object], str]
) -> dict[str, CaptionLists]:
    """The (image, captions) pairs of `file` with these records, by the split that entries name, in
    lower case, or else "". Entries of the same image are joined; empty captions are left out, and
    a warning counts images without others. `read_image` turns an entry's image into its name, or
    raises `ValueError`. One `InputError` names all problems."""
    problems: list[str] = []
    entries: dict[str, Entries] = defaultdict(Entries)
    number = 0
    try:
        for where, content, problem in records:
            number += 1
            try:
                if problem:
                    raise ValueError(problem)
                image, captions = _read_entry(content, read_image)
            except ValueError as error:
                problems.append(f"{where}{_name(content)}: {error}")
                continue
            split = content.get(first_of(SPLIT_FIELDS, content))
            split = "" if _is_empty(split) else str(split).strip().lower()
            entries[split].add(image, captions)
    except UnknownFormat as error:
        raise InputError(f"{file}: {error}") from None
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        others = len(problems) - PROBLEMS_SHOWN
        more = f"\n  ... and {others} more" if others > 0 else ""
        count = f"{len(problems)} of {number} entries cannot be used; mend or remove them:"
        raise InputError(f"{file}: {count}{shown}{more}")
    parts = {split: pairs for split, found in entries.items() if (pairs := found.pairs())}
    if not parts:
        raise InputError(f"{file}: all its captions are empty; write some, or name another file")
    if left_out := sum(map(len, entries.values())) - sum(map(len, parts.values())):
        print(f"warning: {file}: {left_out:,} images are left out, whose captions are empty")
    return parts


def annotations_json(entries: Iterable[tuple[str, list[str]]]) -> bytes:
    """The content of a caption file for these pairs."""
    lines = (
        json.dumps({"image": image, "caption": captions}, ensure_ascii=False)
        for image, captions in entries
    )
    return "[\n{}\n]\n".format(",\n".join(lines)).encode()


def refuse_another_set(annotations: dict[Path, bytes]) -> None:
    """Raise `InputError` for caption files that exist with other content."""
    for path, content in annotations.items():
        if path.exists() and path.read_bytes() != content:
            raise InputError(
                f"{path} belongs to another data set, which is not overwritten: remove that set, "
                "or write into another folder"
            )


def write_set(
    root: Path,
    images: list[str],
    write_image: Callable[[str, Path], None],
    annotations: dict[Path, bytes],
    progress: str,
) -> None:
    """Write `images` (paths relative to `root`), then `annotations`: where these exist, all images
    do. `write_image(image, path)` writes to a temporary path; moving the file is much faster than
    an atomic write. Raises `InputError` if `root` cannot be written, and for another set's
    annotations.
    """
    refuse_another_set(annotations)
    try:
        for folder in {(root / image).parent for image in images}:
            folder.mkdir(parents=True, exist_ok=True)
        if images:
            with TemporaryDirectory(dir=root, prefix=".images.") as staging:
                for image in progress_bar(images, desc=progress, unit="image"):
                    path = Path(staging) / PureWindowsPath(image).name
                    write_image(image, path)
                    path.replace(root / image)
        for path, content in annotations.items():
            if not path.exists():
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"{root}: cannot be written ({error.strerror or error}); make room or choose another "
            "folder, then run this again: what is complete is kept"
        ) from error


def _read_text(path: Path) -> str:
    try:
        return decoded(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(
            f"{missing_annotations(path)}; name another folder, or get Flickr8k: python "
            f"{from_here('flickr8k/prepare.py')} --download"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _read_entry(entry: object, read_image: Callable[[object], str]) -> tuple[str, list]:
    """(image, captions) of one entry. Raises one `ValueError` for all its problems."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, not an object with image and caption")
    image, caption = first_of(IMAGE_FIELDS, entry), first_of(CAPTION_FIELDS, entry)
    try:
        return read_image(entry[image]), read_captions(entry[caption])
    except (KeyError, ValueError):
        wanted = {image or IMAGE_FIELDS[0]: read_image, caption or CAPTION_FIELDS[0]: read_captions}
    problems = []
    for field, parse in wanted.items():
        try:
            if field not in entry:
                raise ValueError("is missing")
            parse(entry[field])
        except ValueError as error:
            problems.append(f'"{field}" {error}')
    others = [str(key) for key in entry if key not in IMAGE_FIELDS + CAPTION_FIELDS]
    shown = f" (it has {one_line(', '.join(others))})" if others else ""
    raise ValueError(f"{'; '.join(problems)}{shown}")


def _name(entry: object) -> str:
    """The image of an entry, spelled as in the file, to search for it there."""
    image = entry.get(first_of(IMAGE_FIELDS, entry)) if isinstance(entry, dict) else None
    return f" ({image!r:.{PATH_LENGTH}})" if isinstance(image, str) else ""


def image_path(image: object) -> str:
    """A path as `root / path` takes it. Raises `ValueError` if it leaves the data folder."""
    if isinstance(image, str) and PLAIN_PATH.fullmatch(image):
        return image
    path = PureWindowsPath(image.strip() if isinstance(image, str) else "")  # takes both slashes
    # Joined to the root ".", a leading ~ would become the user's home.
    upwards = any(not part.strip(" .") for part in path.parts)  # Windows drops spaces at the end
    if path.anchor:
        raise ValueError("is an absolute path; give it relative to the data folder")
    if upwards or path.as_posix().startswith("~"):
        raise ValueError("leaves the data folder; give the path relative to it")
    if not path.name:
        raise ValueError("should be the path of a file")
    _refuse_lone_surrogates(image)
    return path.as_posix()


def why_missing(image: Path) -> str:
    """The path of a missing image, and the likely cause."""
    if not image.name.isprintable():
        shown = json.dumps(str(image), ensure_ascii=False)
        return f"{shown} (in JSON write a path with /, or each \\ twice)"
    beside = image.parent.iterdir() if image.parent.is_dir() else []
    return f"{image}{probably_meant(image.name, (file.name for file in beside))}"


def _refuse_lone_surrogates(text: str) -> None:
    """Raise `ValueError` for half of a character, such as JSON's "\\ud83d": no encoding has it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start])
        message = f"holds a lone surrogate, {shown}; write the whole character or remove it"
        raise ValueError(message) from None


def read_captions(captions: object) -> list[str]:
    """The captions of an entry, without empty ones. Raises `ValueError`."""
    captions = captions if isinstance(captions, list) else [captions]
    texts = [caption for caption in captions if not _is_empty(caption)]
    try:
        _refuse_lone_surrogates("".join(texts))
    except TypeError:
        raise ValueError("should be a string or a list of strings") from None
    return texts


def _is_empty(caption: object) -> bool:
    """Whether there is no caption, also in the spellings of pandas' missing value."""
    if isinstance(caption, str):
        stripped = caption.strip()
        return len(stripped) < 5 and stripped.lower() in NOTHING
    return caption is None or caption != caption  # nan
