"""Your own data set: caption files in any format of `read_records`, and the images they name."""

import random
import re
import sys
from collections.abc import Iterator, Set
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

from flickr8k.sources import FileIndex, SourceFile, absolute
from models.errors import InputError
from models.files import probably_meant
from utils.data.annotations import CHINESE_CLIP, caption_file, collect
from utils.data.caption_folders import folder_records, table_records
from utils.data.caption_formats import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    SPLIT_WORDS,
    SUFFIXES,
    Record,
    UnknownFormat,
    first_of,
    read_records,
)
from utils.data.caption_lists import join_parts
from utils.data.containers import INSIDE

KAGGLE = "captions.txt"  # of Kaggle's copy of Flickr8k
OTHER_SUFFIXES = (".txt", ".xlsx")  # of caption files that are read only if the user names them
RESULT = re.compile(r"(en|cn)_(train|val|test)\.json")  # a file that prepare.py writes
SHOWN = 3  # files without captions that a message names

Captions = dict[str, list[str]]  # path of an image below the output folder -> its captions
Splits = dict[str, list[str]]  # "train", "val" or "test" -> its images
Copied = dict[str, SourceFile]  # path of an image -> the file to copy there


def read_own(
    files: list[SourceFile], root: Path, named: list[Path], language: str = "en"
) -> tuple[Captions, Splits, Copied]:
    """The captions of images, their splits, and the files to copy, by the images' paths below the
    folder `root`; images there are not copied. Captions are read from the files that the user
    `named`, or else from all. Without splits in entries or file names, the images are split at
    random. Raises `InputError` for unusable captions, and images without a file or with several."""
    for source in named:
        if _is_ready(source, language):
            raise InputError(f"{source}: is read as it is: train.py --dataset_path {source}")
    if records := _of_folder(files, named, language):
        holders, parts = named, [collect(named[0], records, _image_name)]
    else:
        holders = caption_files(files, root, {*map(absolute, named)})
        parts = [collect(file, _records(file), _image_name) for file in holders]
    if len(holders) == 1:
        pairs = _split_by_entries(holders[0], parts[0])
    else:
        pairs = dict(zip(_splits(holders), (join_parts(p.values()) for p in parts), strict=True))
    images = {image for part in pairs.values() for image, _ in part}
    target_of, copied = _place(images, files, root)
    captions: Captions = {}
    for image, texts in chain.from_iterable(pairs.values()):
        captions.setdefault(target_of[image], []).extend(texts)
    splits = {
        split: [*dict.fromkeys(target_of[image] for image, _ in part)]
        for split, part in pairs.items()
    }
    if len(splits) == 1:
        splits = split_at_random(captions.keys())
        warn(
            f"the {len(captions):,} images are split at random; a column split, or files of "
            "captions called train, val and test choose otherwise; for the official splits of "
            "Flickr8k name Flickr8k_text.zip with --source as well, or add --download"
        )
    return captions, splits, copied


def _is_ready(source: Path, language: str) -> bool:
    """Whether `train.py` reads a source's splits: folders without a list, Chinese-CLIP's lists."""
    lists = [f for f in source.iterdir() if f.suffix in SUFFIXES] if source.is_dir() else []
    if lists and not any(file.name.endswith(CHINESE_CLIP) for file in lists):
        return False
    return all(caption_file(source, language, split).exists() for split in ("train", "val"))


def _of_folder(
    files: list[SourceFile], named: list[Path], language: str
) -> Iterator[Record] | None:
    """The records of the only source, if it is a folder in a form of `caption_folders`: one with
    containers, beside which programs write tables of other things, or any without a list."""
    folder = next(iter(named), Path())
    has_splits = any((folder / word).is_dir() for word in SPLIT_WORDS)
    if len(named) != 1 or has_splits or not folder.is_dir():
        return None
    is_list = any(_suffix(file) in SUFFIXES for file in files)
    is_list = is_list and not any((*folder.glob("*.tar"), *folder.glob("*.arrow")))
    return None if is_list else folder_records(folder, language)


def _records(file: SourceFile) -> Iterator[Record]:
    if _suffix(file) == ".parquet" and not file.archive:
        return table_records(file.path)
    return read_records(file.read_text(), _suffix(file))


def split_at_random(names: Set[str]) -> Splits:
    """Split images 6 : 1 : 1 into train, val and test. Raises `InputError` for less than three."""
    if len(names) < 3:
        raise InputError(f"{len(names)} images, and train, val, test take at least 3; add some")
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    n_held_out = max(1, len(shuffled) // 8)
    val, test = shuffled[:n_held_out], shuffled[n_held_out : 2 * n_held_out]
    return {"train": shuffled[2 * n_held_out :], "val": val, "test": test}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def caption_files(files: list[SourceFile], root: Path, named: set[Path]) -> list[SourceFile]:
    """The files with captions, among the `named` ones if any of these may have some, but none that
    prepare.py wrote to `root`. Raises `InputError` if no file, or a named one, has none."""
    given = [file for file in files if absolute(file.path) in named and not file.archive]
    given = [file for file in given if _suffix(file) in SUFFIXES + OTHER_SUFFIXES]
    others = [file for file in files if _suffix(file) in SUFFIXES or file.parts[-1] == KAGGLE]
    others = [file for file in others if not RESULT.fullmatch(file.below(root) or "")]
    holders, reasons = [], []
    for file in given or others:
        try:
            records = _records(file)
            if not any(record.problem or _has_both(record.content) for record in records):
                raise UnknownFormat("no entry has an image and a caption")
            holders.append(file)
        except (InputError, UnknownFormat) as error:
            reasons.append(f"\n  {file}: {str(error).removeprefix(f'{file}: ')}")
    shown = "".join(reasons[:SHOWN]) + ("\n  ..." if len(reasons) > SHOWN else "")
    if reasons and (given or not holders):
        raise InputError(f"files of the sources hold no captions:{shown}")
    if not holders:
        raise InputError(
            f"there are no captions in the sources: no Flickr8k.token.txt, {KAGGLE} or "
            "dataset_flickr8k.json, nor CSV, TSV, JSON lines, COCO or a list (en_train.json is a "
            "result: call it captions.json); name what holds one with --source, or add --download"
        )
    if reasons:
        warn(f"files that hold no captions are left out:{shown}")
    return holders


def _suffix(file: SourceFile) -> str:
    return Path(file.parts[-1]).suffix.lower()


def _has_both(entry: object) -> bool:
    is_object = isinstance(entry, dict)
    return is_object and all(first_of(names, entry) for names in (IMAGE_FIELDS, CAPTION_FIELDS))


def _split_by_entries(file: SourceFile, parts: dict[str, list]) -> dict[str, list]:
    """The (image, captions) pairs by the split in their entries; one split counts as "train"."""
    if len(parts) == 1:
        return {"train": join_parts(parts.values())}
    words = ", ".join(repr(word) for word in sorted(parts))
    is_known = parts.keys() <= SPLIT_WORDS.keys()
    if not (is_known and {"train", "val"} <= {SPLIT_WORDS[word] for word in parts}):
        raise InputError(
            f"{file}: split is one of {words}; write train, val or test in every entry, and val in "
            "some, or rename the field to have the images split at random"
        )
    pairs: dict[str, list] = {}
    for word, part in parts.items():
        pairs.setdefault(SPLIT_WORDS[word], []).extend(part)
    return pairs


def _splits(holders: list[SourceFile]) -> list[str]:
    """The split of each file, as its name tells: captions_train2017.json, dev.csv."""
    splits = []
    for file in holders:
        words = re.findall("[a-z]+", Path(file.parts[-1]).stem.lower())
        splits += [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS][:1]
    found = set(splits)
    if not len(holders) == len(splits) == len(found) or not {"train", "val"} <= found:
        raise InputError(
            f"several files hold captions: {', '.join(map(str, holders))}; name one of them with "
            "--source as well, or one for each split, called train, val and test"
        )
    return splits


def _image_name(image: object) -> str:
    path = PureWindowsPath(image.strip() if isinstance(image, str) else "")
    if path.name in ("", ".."):
        raise ValueError("should be the path of a file")
    return path.as_posix()


def _place(images: set[str], files: list[SourceFile], root: Path) -> tuple[dict[str, str], Copied]:
    """The path of each image below `root`, and the files to copy there."""
    index = FileIndex(files, root)
    found = {image: _find(image, index) for image in sorted(images)}
    if missing := [image for image, matches in found.items() if not matches]:
        depth = len(_parts(missing[0]))
        hint = probably_meant(missing[0], ("/".join(file.parts[-depth:]) for file in files))
        raise InputError(
            f"{len(missing):,} of {len(images):,} images are in none of the sources, for example "
            f"{missing[0]}{hint}; name the folder or zip that holds them with --source as well"
        )
    target_of: dict[str, str] = {}
    copied: Copied = {}
    for image, (file, *others) in found.items():
        if others:
            raise InputError(
                f"{image}: several files may be meant, {file} and {others[0]}; write a longer path"
            )
        target, inside = file.below(root), INSIDE.fullmatch(image)
        if inside and file.name.lower().endswith(PurePosixPath(inside[1]).name.lower()):
            if target is None:
                raise InputError(f"{file}: its images stay in it; name its folder with --output")
            target += f"/{inside[3]}"
        elif target is None:
            target = "images/" + re.sub("^images/", "", file.name, flags=re.IGNORECASE)
            if copied.setdefault(target, file) != file:
                raise InputError(
                    f"{file} and {copied[target]} both become {target}; name one --source of both"
                )
        target_of[image] = target
    return target_of, copied


def _find(image: str, index: FileIndex) -> list[SourceFile]:
    """The files that an image may be, or the containers that it may be in."""
    inside = INSIDE.fullmatch(image)
    return (index.find(_parts(inside[1])) if inside else []) or index.find(_parts(image))


def _parts(image: str) -> tuple[str, ...]:
    path = PureWindowsPath(image)
    return path.relative_to(path.anchor).parts if path.anchor else path.parts
