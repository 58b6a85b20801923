"""Captions of one's own: the files that hold them, and the images that they mean.

The files have any format of `read_records`. What they call an image, be it a name, a part of a path
or a whole path of another computer, is compared from its end with the paths of all files.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, Protocol

from models.errors import InputError
from models.files import probably_meant
from utils.data.annotations import captions_by_split, image_path, join_parts
from utils.data.caption_formats import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    SPLIT_WORDS,
    SUFFIXES,
    UnknownFormat,
    first_of,
    read_records,
)

OTHER_SUFFIXES = (".txt", ".xlsx")  # of files that are looked into where they are named
SHOWN = 3  # files that hold no captions


class File(Protocol):
    """A file of a source: the file at `path`, or a member of the zip at `path`."""

    path: Path
    archive: object | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its path, in the zip if it is in one."""

    def read_text(self) -> str: ...


class OwnSet(NamedTuple):
    """A data set in a folder.

    captions  path of an image below the folder -> its captions
    splits    "train", "val" or "test" -> paths of its images; None if the files do not tell
    files     path of an image -> the file to copy there; without those that are there already
    """

    captions: dict[str, list[str]]
    splits: dict[str, list[str]] | None
    files: dict[str, File]


def read_own(files: Iterable[File], root: Path, named: Iterable[Path]) -> OwnSet | None:
    """The data set for the folder `root` that `files` hold; None if no file may hold captions.

    Captions are looked for in the files that the user `named`, or else in all. Raises `InputError`
    for captions that cannot be used, for images that are in none of the files or in several, and
    for several files of captions that are not called train, val and test.
    """
    files = list(
        {(_absolute(file.path), file.archive and file.parts): file for file in files}.values()
    )
    holders = caption_holders(files, root, {_absolute(path) for path in named})
    if not holders:
        return None
    parts = [captions_by_split(file, file.read_text(), _name) for file in holders]
    if len(holders) == 1:
        pairs = _split_by_entries(holders[0], parts[0])
    else:
        pairs = dict(zip(_splits(holders), (join_parts(p.values()) for p in parts), strict=True))
    target_of, copied = _places({i for part in pairs.values() for i, _ in part}, files, root)
    captions: dict[str, list[str]] = {}
    for part in pairs.values():
        for image, texts in part:
            captions.setdefault(target_of[image], []).extend(texts)
    split = {name: [target_of[image] for image, _ in part] for name, part in pairs.items()}
    return OwnSet(captions, split if len(pairs) > 1 else None, copied)


def _split_by_entries(file: File, parts: dict[str, list]) -> dict[str, list]:
    """The (image, captions) pairs by split, as the entries of a file say it; all as "train" if they
    say nothing, or one split of all."""
    if len(parts) == 1:
        return {"train": join_parts(parts.values())}
    words = ", ".join(repr(word) for word in sorted(parts))
    pairs: dict[str, list] = {}
    for word, part in parts.items():
        if word not in SPLIT_WORDS:
            raise InputError(
                f"{file}: split is one of {words}; write train, val or test in every entry, or "
                "rename the field to have the images split at random"
            )
        pairs.setdefault(SPLIT_WORDS[word], []).extend(part)
    if not {"train", "val"} <= pairs.keys():
        raise InputError(
            f"{file}: split is one of {words}; write val in entries to validate on, or rename the "
            "field to have the images split at random"
        )
    return pairs


def caption_holders(files: list[File], root: Path, named: set[Path]) -> list[File]:
    """Those of the files that hold captions, among `named` ones if any of these may; without the
    lists that stand in `root` as results. Raises `InputError` if none of them does, though some
    might, or one that is named does not, or if there are results alone."""
    given = [file for file in files if _absolute(file.path) in named and not file.archive]
    given = [file for file in given if _suffix(file) in SUFFIXES + OTHER_SUFFIXES]
    found = [file for file in files if _suffix(file) in SUFFIXES and not _is_result(root, file)]
    holders, reasons = [], []
    for file in given or found:
        try:
            records = read_records(file.read_text(), _suffix(file))
            if not any(record.problem or _has_both(record.content) for record in records):
                raise UnknownFormat("no entry has an image and a caption")
            holders.append(file)
        except UnknownFormat as error:
            reasons.append(f"{file}: {error}")
            if given:
                raise InputError(reasons[0]) from None
    more = f"\n  ... and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
    listed = "".join(f"\n  {reason}" for reason in reasons[:SHOWN]) + more
    if reasons and not holders:
        raise InputError(f"no file of the sources holds captions:{listed}")
    if not holders and (results := [f.parts[-1] for f in files if _is_result(root, f)]):
        raise InputError(
            f"{root}: {', '.join(results)}: named as the lists that are written here; rename a "
            "list of all images (captions.json), or write into another folder (--output)"
        )
    if reasons:
        print(f"warning: files that hold no captions are left out:{listed}", file=sys.stderr)
    return holders


def _suffix(file: File) -> str:
    return Path(file.parts[-1]).suffix.lower()


def _is_result(root: Path, file: File) -> bool:
    name = file.parts[-1]
    is_list = re.fullmatch(r"(en|cn)_(train|val|test)\.json", name)
    return is_list is not None and _below(root, file) == name


def _has_both(entry: object) -> bool:
    return isinstance(entry, dict) and bool(
        first_of(IMAGE_FIELDS, entry) and first_of(CAPTION_FIELDS, entry)
    )


def _splits(holders: list[File]) -> list[str]:
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


def _name(image: object) -> str:
    path = PureWindowsPath(image.strip() if isinstance(image, str) else "")
    if not path.name or path.name == "..":
        raise ValueError("should be the path of a file")
    return path.as_posix()


def _places(
    images: Iterable[str], files: list[File], root: Path
) -> tuple[dict[str, str], dict[str, File]]:
    """The path below `root` of each image, and the files to copy to those that are not there."""
    ending: dict[tuple[str, ...], list[File]] = {}  # with the last parts of a path, in lower case
    for file in files:
        parts = _folded(file.parts)
        for start in range(len(parts)):
            ending.setdefault(parts[start:], []).append(file)
    images = sorted(images)
    found = {image: _find(image, ending, root) for image in images}
    if missing := [image for image in images if found[image] is None]:
        depth = len(_parts(missing[0]))
        hint = probably_meant(missing[0], ("/".join(file.parts[-depth:]) for file in files))
        raise InputError(
            f"{len(missing):,} of {len(images):,} images are in none of the sources, for example "
            f"{missing[0]}{hint}; name the folder or zip that holds them with --source as well"
        )
    target_of: dict[str, str] = {}
    copied: dict[str, File] = {}
    image_of: dict[str, str] = {}
    for image, file in found.items():
        there = _below(root, file)
        target_of[image] = target = there or f"images/{_relative(image)}"
        other = image_of.setdefault(target.casefold(), image)
        if other != image:
            raise InputError(
                f"{other} and {image} both become {target}; spell an image in one way only, and "
                "give different ones paths relative to one folder"
            )
        if not there:
            copied[target] = file
        try:
            usable = image_path(target) == target
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"{target}: this name cannot be used everywhere; rename the image")
    return target_of, copied


def _find(image: str, ending: dict[tuple[str, ...], list[File]], root: Path) -> File | None:
    """The file whose path ends with most of `image`; among equals one that is spelled the same, one
    in `root`, one that is not in a zip."""
    parts = _parts(image)
    folded = _folded(parts)
    matches = (ending[folded[start:]] for start in range(len(parts)) if folded[start:] in ending)
    candidates = next(matches, [])
    ranks = [
        (file.parts[-1] == parts[-1], _below(root, file) is not None, not file.archive)
        for file in candidates
    ]
    best = [f for f, rank in zip(candidates, ranks, strict=True) if rank == max(ranks)]
    if len(best) > 1:
        raise InputError(
            f"{image}: several files may be meant, {best[0]} and {best[1]}; write more of the path "
            "in the captions' file"
        )
    return best[0] if best else None


def _folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part.casefold() for part in parts)


def _parts(image: str) -> tuple[str, ...]:
    path = PureWindowsPath(image)
    return path.relative_to(path.anchor).parts if path.anchor else path.parts


def _relative(image: str) -> str:
    """Where below images/ a copy of the image goes: as the captions' file has it, or its name alone
    if that is no path within a folder."""
    parts = _parts(image)
    if PureWindowsPath(image).anchor or ".." in parts:
        return parts[-1]
    return "/".join(parts[1:] if len(parts) > 1 and parts[0].casefold() == "images" else parts)


def _below(root: Path, file: File) -> str | None:
    """The path of a file relative to `root`; None if it is in a zip or elsewhere."""
    path, folder = _absolute(file.path), _absolute(root)
    if file.archive or not path.is_relative_to(folder):
        return None
    return path.relative_to(folder).as_posix()


def _absolute(path: Path) -> Path:
    """Without following links: an image that a link in the data folder leads to is in it."""
    return Path(os.path.abspath(path))  # noqa: PTH100
