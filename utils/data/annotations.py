"""The caption files, `{language}_{train,val}.json`: reading them, and writing a set of them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory

from models.errors import InputError
from models.files import read_bytes
from models.progress_bar import progress_bar
from utils.runs.files import replaced_whole

PROBLEMS_SHOWN = 10  # of one caption file
SHARED_SHOWN = 3  # images that are in both splits
PATH_LENGTH = 100  # characters shown of a path


def missing_annotations(file: Path) -> str | None:
    """Why a caption file is not found: there is no such folder, or no such file in it, only others
    of its split. None if the file is there."""
    root = file.parent
    if not root.is_dir():
        return f"{root}: {'is no folder' if root.exists() else 'no such folder'}"
    if file.is_file():
        return None
    split = file.name.rpartition("_")[2]
    others = sorted(other.name for other in root.glob(f"*_{split}") if other.is_file())
    return f"{root}: no {file.name} in it" + (f", only {', '.join(others)}" if others else "")


def shared_images_warning(train: Iterable[str], val: Iterable[str]) -> str | None:
    """A warning that names images listed in both splits; None where there are none."""
    held_out = set(val)
    shared = [image for image in train if image in held_out]
    if not shared:
        return None
    more = ", ..." if len(shared) > SHARED_SHOWN else ""
    return (
        f"images in both training and validation: {len(shared)} ({', '.join(shared[:SHARED_SHOWN])}"
        f"{more}); scores on images seen in training are too good; list each image once"
    )


def read_annotations(path: Path) -> list[tuple[str, list[str]]]:
    """The (image path relative to the root, captions) pairs of a caption file.

    The file is a list of `{"image": "images/1.jpg", "caption": ["...", ...]}`; paths may have
    backslashes, and a caption may be a plain string. One `InputError` names all problems.
    """
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        found = "lists no images" if entries == [] else "is no list"
        raise InputError(f'{path}: {found}; it should hold [{{"image": ..., "caption": ...}}, ...]')
    problems: list[str] = []
    pairs = []
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries):
        try:
            image, captions = _read_entry(entry)
            if image in seen:
                raise ValueError(f"this image is listed already, in entry {seen[image]}")
            seen[image] = number
            pairs.append((image, captions))
        except ValueError as error:
            problems.append(f"entry {number}{_name(entry)}: {error}")
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:PROBLEMS_SHOWN])
        others = len(problems) - PROBLEMS_SHOWN
        more = f"\n  ... and {others} more" if others > 0 else ""
        count = f"{len(problems)} of {len(entries)} entries cannot be used; mend or remove them:"
        raise InputError(f"{path}: {count}{shown}{more}")
    return pairs


def annotations_json(entries: Iterable[tuple[str, list[str]]]) -> bytes:
    """The content of a caption file for (image path relative to the root, captions) pairs. Raises
    `InputError` for text that cannot be written."""
    entries = list(entries)
    for image, captions in entries:
        try:
            _refuse_halves("".join([image, *captions]))
        except ValueError as error:
            raise InputError(f"{_as_json(image)}: its name or a caption {error}") from None
    lines = [
        json.dumps({"image": image, "caption": captions}, ensure_ascii=False)
        for image, captions in entries
    ]
    return "[\n{}\n]\n".format(",\n".join(lines)).encode()


def refuse_another_set(annotations: dict[Path, bytes]) -> None:
    """Raise `InputError` where a caption file stands already with other content."""
    for path, content in annotations.items():
        if path.exists() and read_bytes(path) != content:
            raise InputError(
                f"{path} belongs to another data set, which is not overwritten: "
                "remove that set, or write into another folder (--output)"
            )


def write_set(
    root: Path,
    images: list[str],
    write_image: Callable[[str, Path], None],
    annotations: dict[Path, bytes],
    progress: str,
) -> None:
    """Write `images` (paths relative to `root`), each whole or not at all, then `annotations`.

    The annotations come last, so where they are, all images are. `write_image(image, path)` writes
    one image to a path outside the images' folder, and the file is then moved there: this is much
    faster than flushing every file to disk. Raises `InputError` for a folder or a disk that cannot
    be written, and for another set's annotations; images that are complete by then stay.
    """
    refuse_another_set(annotations)
    try:
        if images:
            bar = progress_bar(images, desc=progress, unit="image")
            _write_images(root, bar, write_image)
        for path, content in annotations.items():
            if not path.exists():
                with replaced_whole(path) as temporary:
                    temporary.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"{root}: cannot be written ({error.strerror or error}); make room or choose another "
            "folder (--output), then run this again: what is complete is kept"
        ) from error


def _write_images(
    root: Path, images: Iterable[str], write_image: Callable[[str, Path], None]
) -> None:
    (root / "images").mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=".images.") as staging:
        for image in images:
            path = Path(staging) / PureWindowsPath(image).name
            write_image(image, path)
            path.replace(root / image)


def _read_json(path: Path) -> object:
    try:
        return json.loads(read_bytes(path).decode("utf-8-sig"))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(
            f"{missing_annotations(path)}; name another folder (--dataset_path), or get Flickr8k: "
            "python flickr8k/prepare.py --download"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise InputError(f"{path}: is empty; get a new copy, or write it anew") from None
        where = f"line {error.lineno}, column {error.colno}"
        nul = "; it holds NUL bytes: save it as UTF-8" if "\0" in error.doc else ""
        raise InputError(f"{path}: broken JSON at {where}: {error.msg}{nul}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of 5,000 digits
        raise InputError(f"{path}: broken JSON: {error}") from None


def _read_entry(entry: object) -> tuple[str, list[str]]:
    """(image path, captions) of one entry. Raises `ValueError` that names all its problems."""
    if not isinstance(entry, dict):
        raise ValueError(f"is {type(entry).__name__}, not an object with image and caption")
    fields, problems = [], []
    for field, parse in (("image", _image_path), ("caption", _captions)):
        try:
            if field not in entry:
                raise ValueError("is missing")
            fields.append(parse(entry[field]))
        except ValueError as error:
            problems.append(f'"{field}" {error}')
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(fields)


def _name(entry: object) -> str:
    """The image of an entry, spelled as in the file, so that one can search for it there."""
    image = entry.get("image") if isinstance(entry, dict) else None
    if not isinstance(image, str):
        return ""
    return f" ({_as_json(image)[:PATH_LENGTH]})"


def _as_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()


def _image_path(image: object) -> str:
    path = PureWindowsPath(image.strip() if isinstance(image, str) else "")  # takes both slashes
    # Joined to the root ".", a leading ~ would become the user's home.
    upwards = any(not part.strip(" .") for part in path.parts)  # Windows drops spaces at the end
    if path.anchor or upwards or path.as_posix().startswith("~"):
        raise ValueError("leaves the data folder; give the path relative to it")
    if not path.name:
        raise ValueError("should be the path of a file")
    _refuse_halves(image)
    return path.as_posix()


def _refuse_halves(text: str) -> None:
    """JSON can spell half of a character, as in "\\ud83d", which nothing else can write down."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = _as_json(text[error.start])
        message = f"holds {half}, half of a character; write it whole or remove it"
        raise ValueError(message) from None


def _captions(captions: object) -> list[str]:
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        raise ValueError("should be a string or a list of strings")
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError("holds an empty or non-text caption")
    _refuse_halves("".join(captions))
    return captions
