"""Prepare Flickr8k: bring any of its usual copies into the layout that `Flickr8kDataset` reads.

    python flickr8k/prepare.py --download
    python flickr8k/prepare.py --source Flickr8k_Dataset.zip Flickr8k_text.zip

writes `images/*.jpg`, `en_train.json`, `en_val.json` (the official development split) and
`en_test.json` beside this script. A source is a folder, a zip or a single file; together they are
searched, to any depth, for the images, and for captions and splits in one of these formats:

    Flickr8k.token.txt or captions.txt    the official captions, or those of the Kaggle copy
    Flickr_8k.{train,dev,test}Images.txt  and the official splits (in Flickr8k_text.zip)

    dataset_flickr8k.json                 captions and splits as Karpathy published them

    Flickr8k.token.txt or captions.txt    captions alone: split at random, with a warning

Flickr8k (Hodosh, Young, Hockenmaier 2013) is for non-commercial research and education.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile, ZipInfo

from tqdm import tqdm

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import InputError, run_script
from utils.data.annotations import annotations_json, refuse_another_set, write_set
from utils.runs import arguments

Captions = dict[str, list[str]]  # of an image, by its name
Splits = dict[str, list[str]]  # images' names, by split

RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
IMAGES_ZIP, TEXT_ZIP = "Flickr8k_Dataset.zip", "Flickr8k_text.zip"
MD5 = {
    IMAGES_ZIP: "f18a1e2920de5bd84dae7cf08ec78978",
    TEXT_ZIP: "bf6c1abcb8e4a833b7f922104de18627",
}
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
TOKENS, KAGGLE, KARPATHY = "Flickr8k.token.txt", "captions.txt", "dataset_flickr8k.json"
OFFICIAL_COUNTS = {"train": 6000, "val": 1000, "test": 1000}
CAPTIONS_PER_IMAGE = 5
BLOCK = 1 << 20  # bytes


class SourceFile(NamedTuple):
    """A file of a source: on its own, or a member of the zip at `path`."""

    path: Path
    size: int
    archive: ZipFile | None = None
    member: ZipInfo | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member.filename}" if self.archive else str(self.path)

    def read_bytes(self) -> bytes:
        with _readable(self):
            return self.archive.read(self.member) if self.archive else self.path.read_bytes()

    def read_text(self) -> str:
        try:
            return self.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self}: is not UTF-8 at byte {error.start}; get a new copy"
            ) from None


SourceFiles = dict[str, SourceFile]  # by name without folders


@contextmanager
def _readable(file: SourceFile | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); get a new copy of it, or move it out of the source"
        ) from error


def find_files(sources: Iterable[Path], root: Path, opened: ExitStack) -> SourceFiles:
    """All files of the folders, zips and single files in `sources`, by name.

    Of files with the same name the first one counts, a plain file before a zip's member. The images
    already prepared in `root` are no source. Zips stay open until `opened` closes.
    """
    files: SourceFiles = {}
    zips = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: there is no such file or folder (--source)")
        for path in [source] if source.is_file() else _walk(source, skipped=root / "images"):
            if path.suffix.lower() == ".zip":
                zips.append(path)
            else:
                files.setdefault(path.name, SourceFile(path, path.stat().st_size))
    for path in zips:
        if path.name in MD5:
            _check_md5(path)
        files = _zip_members(path, opened) | files
    return files


def _walk(folder: Path, skipped: Path) -> Iterator[Path]:
    """The files below `folder`, without hidden ones: what macOS adds, what a killed run left."""
    for current, subfolders, names in os.walk(folder):
        if Path(current).resolve() == skipped.resolve():
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(current) / name for name in sorted(names) if not name.startswith(".")]
        yield from (path for path in paths if path.is_file())


def _zip_members(path: Path, opened: ExitStack) -> SourceFiles:
    with _readable(path):
        archive = opened.enter_context(ZipFile(path))
    files: SourceFiles = {}
    for member in archive.infolist():
        if not member.is_dir():
            name = PureWindowsPath(member.filename).name  # takes both slashes
            files.setdefault(name, SourceFile(path, member.file_size, archive, member))
    return files


def _check_md5(path: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    size = path.stat().st_size
    with (
        _readable(path),
        path.open("rb") as file,
        tqdm(desc=f"checking {path.name}", total=size, unit="B", unit_scale=True) as progress,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    if digest.hexdigest() != MD5[path.name]:
        raise InputError(
            f"{path}: its MD5 is {digest.hexdigest()}, the official file's {MD5[path.name]}: get a "
            "new copy (--download does), or rename it if it is meant to be another file"
        )


def read_tokens(file: SourceFile) -> Captions:
    """The official captions: lines of `name.jpg#0<TAB>caption`."""
    captions: Captions = {}
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if not (tab and hash_sign):
            raise InputError(f"{file}: line {number} is not name.jpg#0<TAB>caption: {line[:80]!r}")
        captions.setdefault(name, []).append(caption.strip())
    return captions


def read_list(file: SourceFile) -> list[str]:
    """An official split: a file name a line."""
    return [line.strip() for line in file.read_text().split("\n") if line.strip()]


def read_kaggle(file: SourceFile) -> Captions:
    """The Kaggle copy's captions: CSV with the header `image,caption`."""
    captions: Captions = {}
    rows = csv.reader(io.StringIO(file.read_text(), newline=""), strict=True)
    try:
        if next(rows, None) != ["image", "caption"]:
            raise InputError(f"{file}: does not start with image,caption as the Kaggle copy does")
        for row in filter(None, rows):
            if len(row) != 2:
                raise InputError(
                    f"{file}: line {rows.line_num} has {len(row)} fields, not image and caption; "
                    "a caption with commas needs quotes around it"
                )
            captions.setdefault(row[0], []).append(row[1].strip())
    except csv.Error as error:
        raise InputError(
            f"{file}: broken CSV at line {rows.line_num} ({error}); get a new copy"
        ) from None
    return captions


def read_karpathy(file: SourceFile) -> tuple[Captions, Splits]:
    """Karpathy's captions and splits, in one JSON."""
    captions: Captions = {}
    splits: Splits = {split: [] for split in SPLIT_LISTS}
    text = file.read_text()
    try:
        for image in json.loads(text)["images"]:
            name = image["filename"].strip()
            splits[image["split"]].append(name)
            captions[name] = [sentence["raw"].strip() for sentence in image["sentences"]]
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: is not Karpathy's JSON ({type(error).__name__}: {error}); it should hold "
            "images with filename, split (train, val or test) and sentences with raw"
        ) from None
    return captions, splits


CAPTION_READERS = {TOKENS: read_tokens, KAGGLE: read_kaggle}


def has_official_splits(files: SourceFiles) -> bool:
    """Whether captions and the split that published scores are measured on are both there."""
    listed = files.keys() >= set(SPLIT_LISTS.values())
    return KARPATHY in files or (listed and not files.keys().isdisjoint(CAPTION_READERS))


def read_source(files: SourceFiles, images: Set[str]) -> tuple[Captions, Splits]:
    """Captions and splits in whichever format is there, the official lists first.

    Captions without splits are split anew over those of `images` that have some.
    """
    unlisted = [name for name in SPLIT_LISTS.values() if name not in files]
    captions_name = next((name for name in CAPTION_READERS if name in files), None)
    if KARPATHY in files and (unlisted or not captions_name):
        return read_karpathy(files[KARPATHY])
    if not captions_name:
        raise InputError(
            f"no captions in the {len(files):,} files of the sources: neither {TOKENS}, {KAGGLE} "
            f"nor {KARPATHY}; name a folder or zip that holds one with --source, or add --download"
        )
    captions = CAPTION_READERS[captions_name](files[captions_name])
    if not unlisted:
        return captions, {split: read_list(files[name]) for split, name in SPLIT_LISTS.items()}
    if len(unlisted) < len(SPLIT_LISTS):
        raise InputError(
            f"some official split lists are there, but not {', '.join(unlisted)}: "
            f"name {TEXT_ZIP} with --source, or add --download"
        )
    return captions, split_anew(images & captions.keys())


def split_anew(names: Set[str]) -> Splits:
    """The same 6 : 1 : 1 split on every machine, where the official one is not at hand."""
    _warn(
        f"the official splits ({TEXT_ZIP}) are in none of the sources: the {len(names):,} images "
        "with captions are split at random, and scores cannot be compared with published ones; "
        f"for the official splits name {TEXT_ZIP} with --source too, or add --download"
    )
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    n_held_out = max(1, len(shuffled) // 8)
    val, test = shuffled[:n_held_out], shuffled[n_held_out : 2 * n_held_out]
    return {"train": shuffled[2 * n_held_out :], "val": val, "test": test}


def check_splits(splits: Splits, captions: Captions) -> None:
    """Raise `InputError` where an image is used twice or has no caption; warn of odd counts."""
    names = [name for split in splits.values() for name in split]
    if not all(splits.values()):
        empty = " and ".join(split for split, listed in splits.items() if not listed)
        raise InputError(f"no images for {empty}: is the source complete (--source)?")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{name} is in the splits {count} times: list it once, in one split")
        if not captions.get(name):
            raise InputError(
                f"{name} is in the splits, but has no caption: is the source complete?"
            )
    odd = [name for name in names if len(captions[name]) != CAPTIONS_PER_IMAGE]
    if odd:
        _warn(f"images without exactly {CAPTIONS_PER_IMAGE} captions: {len(odd):,}, as {odd[0]}")
    counts = {split: len(listed) for split, listed in splits.items()}
    if counts != OFFICIAL_COUNTS:
        _warn(f"{_in_words(counts)}, where Flickr8k has {_in_words(OFFICIAL_COUNTS)}")


def prepare(root: Path, sources: Iterable[Path] = (), fetch: bool = False) -> dict[str, int]:
    """Write Flickr8k from `sources` below `root` and return the number of images in each split.

    With `fetch`, what the sources lack is downloaded to `root / "downloads"`. What stands already
    is left alone: images of the source's size, and annotations of this very set; those of another
    set are never overwritten (`InputError`).
    """
    sizes = {path.name: path.stat().st_size for path in (root / "images").glob("*")}
    standing = {name: size for name, size in sizes.items() if size}  # empty: after a power cut
    with ExitStack() as opened:
        files = find_files(sources, root, opened)
        if fetch and not has_official_splits(files):
            files = _zip_members(_download(TEXT_ZIP, root), opened) | files
        captions, splits = read_source(files, standing.keys() | files.keys())
        captions = {name: [text for text in texts if text] for name, texts in captions.items()}
        check_splits(splits, captions)
        annotations = {
            root / f"en_{split}.json": annotations_json(
                (f"images/{name}", captions[name]) for name in sorted(names)
            )
            for split, names in splits.items()
        }
        refuse_another_set(annotations)

        needed = [name for names in splits.values() for name in names]
        if fetch and not set(needed) <= standing.keys() | files.keys():
            files = _zip_members(_download(IMAGES_ZIP, root), opened) | files
        missing = [name for name in needed if name not in files and name not in standing]
        if missing:
            raise InputError(
                f"{len(missing):,} of {len(needed):,} images are in none of the sources, as "
                f"{missing[0]}: name the folder or zip that holds them with --source, "
                "or add --download"
            )
        write_set(
            root,
            images=[
                f"images/{name}"
                for name in needed
                if name not in standing or (name in files and files[name].size != standing[name])
            ],
            write_image=lambda image, path: path.write_bytes(files[path.name].read_bytes()),
            annotations=annotations,
            progress="writing the images",
        )
    return {split: len(names) for split, names in splits.items()}


def _download(name: str, root: Path) -> Path:
    from models.weights.download import download

    return download(f"{RELEASE}/{name}", root / "downloads" / name, MD5[name])


def _in_words(counts: dict[str, int]) -> str:
    train, val, test = (f"{counts[split]:,}" for split in SPLIT_LISTS)
    return f"{train} training, {val} validation and {test} test images"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Bring Flickr8k into the layout that train.py reads: images/*.jpg and "
        "en_{train,val,test}.json, with the official splits. What is there already is not done "
        "again. Flickr8k is for non-commercial research and education.",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="download what no source holds (all: 1.1 GB) to OUTPUT/downloads; a "
        f"broken-off download is continued, and {IMAGES_ZIP} may be deleted in the end",
    )
    parser.add_argument(
        "--source",
        type=arguments.path,
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"folders, zips or files that hold Flickr8k: {IMAGES_ZIP} and {TEXT_ZIP} or what they "
        f"unpack to, the Kaggle copy (archive.zip: Images and {KAGGLE}; add {TEXT_ZIP} or "
        f"--download for the official splits), or Karpathy's {KARPATHY} and the images",
    )
    parser.add_argument(
        "--output",
        type=arguments.path,
        default=Path(__file__).resolve().parent,
        help="folder to write into (default: the folder of this script)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if not (args.download or args.source):
        parser.error("say where Flickr8k comes from: --download, or --source PATH if you have it")
    counts = prepare(args.output, args.source, fetch=args.download)
    print(f"Flickr8k in {args.output}: {_in_words(counts)}")


if __name__ == "__main__":
    run_script(main)
