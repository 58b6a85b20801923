"""Class folders: a folder of images for each class, whose name is that of the class."""

import re
from pathlib import Path

LEADING_NUMBER = re.compile(r"^n?\d+([\W_]+(?=.*[^\W\d_])|(?=[A-Z][a-z]))")  # of a folder's name


def class_folders(root: Path) -> list[Path]:
    """The folders in `root` without hidden ones, sorted by name with 2 before 10, if any."""

    def key(folder: Path) -> tuple[list, str]:
        parts = re.split(r"(\d+)", folder.name)  # text and numbers in turn
        return [int(part) if part.isdecimal() else part for part in parts], folder.name

    files = root.iterdir() if root.is_dir() else ()
    return sorted((file for file in files if file.name[0] != "." and file.is_dir()), key=key)


def words_of(keys: list[str]) -> list[str]:
    """Folders' names as words: `BigCat` as "Big Cat"; if all have numbers, `001.cat` as "cat"."""
    rests = [LEADING_NUMBER.sub("", key) for key in keys]
    if all(map(str.__ne__, rests, keys)) and len({*rests}) == len(keys):
        keys = rests
    spaced = (re.sub("(?<=[a-z])(?=[A-Z])", " ", key) if key.isalpha() else key for key in keys)
    return [key.replace("_", " ").strip() or key for key in spaced]
