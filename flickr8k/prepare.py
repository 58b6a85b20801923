"""Prepare Flickr8k: turn any of its usual copies into the files that `Flickr8kDataset` reads.

    python flickr8k/prepare.py --download
    python flickr8k/prepare.py --source Flickr8k_Dataset.zip Flickr8k_text.zip

    python flickr8k/prepare.py --source my_data --output my_data

writes `images/*.jpg`, `en_train.json`, `en_val.json` (the official development split) and
`en_test.json` to the folder of this script. A source is a folder, a zip or a single file. The
sources, with all subfolders, are searched for the images, and for captions and splits in one of
these formats:

1. `Flickr8k.token.txt` (the official captions) or `captions.txt` (the Kaggle copy's), and the
   official splits `Flickr_8k.{train,dev,test}Images.txt`, which are in `Flickr8k_text.zip`;
2. `dataset_flickr8k.json`, Karpathy's file, which holds both captions and splits;
3. `Flickr8k.token.txt` or `captions.txt` alone: the images are split at random, with a warning;
4. captions of one's own, as CSV, TSV, JSON lines, COCO or a list (see `read_records`): one file,
   whose entries say their split (a column `split`: train, val, test) or whose images are split at
   random, with a warning, or several that are called train, val and test.
   Images that lie in the output folder stay where they are, others are copied to `images/`.

Flickr8k (Hodosh, Young, Hockenmaier 2013) is for non-commercial research and education.
"""

import hashlib
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

if not __package__:  # as a script: Python looks for modules in this folder, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flickr8k.own_captions import OwnSet, read_own
from models import scripts
from models.errors import InputError
from models.files import check_regular, check_size, decoded
from models.host import run_script
from models.progress_bar import progress_bar
from utils.data.annotations import (
    annotations_json,
    captions_by_split,
    join_parts,
    refuse_another_set,
    write_set,
)

Captions = dict[str, list[str]]  # name of an image -> its captions
Splits = dict[str, list[str]]  # "train", "val" or "test" -> names of its images

RELEASE = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
IMAGES_ZIP, TEXT_ZIP = "Flickr8k_Dataset.zip", "Flickr8k_text.zip"
MD5 = {  # of the official zips, in hexadecimal
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
    """A file of a source: the file at `path`, or a member of the zip at `path`."""

    path: Path
    size: int  # bytes, unpacked
    archive: ZipFile | None = None
    member: ZipInfo | None = None

    def __str__(self) -> str:
        return f"{self.path}/{self.member.filename}" if self.archive else str(self.path)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its path, in the zip if it is in one."""
        return PureWindowsPath(self.member.filename).parts if self.archive else self.path.parts

    def read_bytes(self) -> bytes:
        """The content. Raises `InputError` if it cannot be read, or is too large."""
        check_size(self, self.size)
        with _readable(self):
            return self.archive.read(self.member) if self.archive else self.path.read_bytes()

    def read_text(self) -> str:
        """The content as text. Raises `InputError` if it cannot be read or is not UTF-8."""
        return decoded(self.read_bytes(), self)


SourceFiles = dict[str, SourceFile]  # name without folders -> file


@contextmanager
def _readable(file: SourceFile | Path) -> Iterator[None]:
    """Turn errors of reading `file` in the `with` block into an `InputError` that names it."""
    try:
        yield
    except (OSError, BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(
            f"{file}: cannot be read ({error}); get a new copy of it, or move it out of the source"
        ) from error


def find_files(sources: Iterable[Path], open_zips: ExitStack) -> list[SourceFile]:
    """All files in `sources`, which are folders, zips and single files, without hidden ones: macOS
    adds some, and a run that was killed leaves a hidden folder.

    Zips stay open until `open_zips` is closed. Raises `InputError` for a source that does not exist
    or cannot be read, and for an official zip with another MD5.
    """
    files: list[SourceFile] = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: there is no such file or folder (--source)")
        if not source.is_dir():
            check_regular(source)
        for path in [source] if source.is_file() else _walk(source):
            if path.suffix.lower() != ".zip":
                files.append(SourceFile(path, path.stat().st_size))
                continue
            if path.name in MD5:
                _check_md5(path)
            files += _zip_members(path, open_zips)
    return files


def by_name(files: Iterable[SourceFile], root: Path) -> SourceFiles:
    """The files by their names; of several with one name, a plain file is taken before a member of
    a zip. Images that stand in `root / "images"` are left out, since they are results."""
    results = os.path.abspath(root / "images")  # noqa: PTH100
    named: SourceFiles = {}
    for file in sorted(files, key=lambda file: file.archive is not None):
        if not Path(os.path.abspath(file.path)).is_relative_to(results):  # noqa: PTH100
            named.setdefault(file.parts[-1], file)
    return named


def _walk(folder: Path) -> Iterator[Path]:
    for current, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(current) / name for name in sorted(names) if not name.startswith(".")]
        yield from (path for path in paths if path.is_file())


def _zip_members(path: Path, open_zips: ExitStack) -> list[SourceFile]:
    """The files in a zip, which stays open until `open_zips` is closed."""
    with _readable(path):
        archive = open_zips.enter_context(ZipFile(path))
    members = [SourceFile(path, m.file_size, archive, m) for m in archive.infolist()]
    return [m for m in members if not (m.member.is_dir() or m.parts[-1].startswith("."))]


def _check_md5(path: Path) -> None:
    """Raise `InputError` if an official zip has another MD5 than it should."""
    digest = hashlib.md5(usedforsecurity=False)
    size = path.stat().st_size
    with (
        _readable(path),
        path.open("rb") as file,
        progress_bar(
            desc=f"checking {path.name}", total=size, unit="B", unit_scale=True
        ) as progress,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    if digest.hexdigest() != MD5[path.name]:
        raise InputError(
            f"{path}: its MD5 is {digest.hexdigest()}, but that of the official file is "
            f"{MD5[path.name]}; get a new copy (for example with --download), or rename the file "
            "if it is meant to be another one"
        )


def read_tokens(file: SourceFile) -> Captions:
    """The official captions, one a line: `name.jpg#0<TAB>caption`. Raises `InputError` for any
    other line."""
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
    """The images of an official split, one name a line."""
    return [line.strip() for line in file.read_text().split("\n") if line.strip()]


def read_kaggle(file: SourceFile) -> Captions:
    """The captions of the Kaggle copy: CSV with the header `image,caption`. Raises `InputError` for
    another header, for rows with other numbers of fields, and for a column of splits."""
    parts = captions_by_split(file, file.read_text(), str)
    if len(parts) > 1:
        raise InputError(
            f"{file}: says of the images which split they are in, as the Kaggle copy does not; if "
            "it is a list of yours, call it captions.csv, and it is split so"
        )
    return dict(join_parts(parts.values()))


def read_karpathy(file: SourceFile) -> tuple[Captions, Splits]:
    """Captions and splits from Karpathy's JSON file. Raises `InputError` if it holds anything
    else."""
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
    """Whether the files hold captions together with the official splits, on which published scores
    are measured."""
    listed = files.keys() >= set(SPLIT_LISTS.values())
    return KARPATHY in files or (listed and not files.keys().isdisjoint(CAPTION_READERS))


def read_source(files: SourceFiles, images: Set[str]) -> tuple[Captions, Splits]:
    """Captions and splits, from the first format of this module's docstring that is there.

    Without any official splits, those of `images` that have captions are split at random, and a
    warning says how many captioned ones are not there. Raises `InputError` if there are no
    captions, or only some of the official split lists.
    """
    missing_lists = [name for name in SPLIT_LISTS.values() if name not in files]
    captions_name = next((name for name in CAPTION_READERS if name in files), None)
    if KARPATHY in files and (missing_lists or not captions_name):
        return read_karpathy(files[KARPATHY])
    if not captions_name:
        raise InputError(
            f"there are no captions in the sources: none of {TOKENS}, {KAGGLE} and {KARPATHY}, and "
            "no other file with CSV, TSV, JSON lines, COCO or a list; name a folder or zip that "
            "holds one of them with --source, or add --download"
        )
    captions = CAPTION_READERS[captions_name](files[captions_name])
    if not missing_lists:
        return captions, {split: read_list(files[name]) for split, name in SPLIT_LISTS.items()}
    if len(missing_lists) < len(SPLIT_LISTS):
        raise InputError(
            f"some official split lists are there, but not {', '.join(missing_lists)}; "
            f"name {TEXT_ZIP} with --source, or add --download"
        )
    names = captions.keys() & images
    if lost := [name for name in captions if name not in names]:
        _warn(
            f"{len(lost):,} images with captions are left out, for example {lost[0]}: the sources "
            "hold no file of that name"
        )
    _warn(
        f"the official splits ({TEXT_ZIP}) are in none of the sources; the {len(names):,} images "
        "with captions are split at random, so scores cannot be compared with published ones; "
        f"to get the official splits, name {TEXT_ZIP} with --source as well, or add --download"
    )
    return captions, split_at_random(names)


def split_at_random(names: Set[str]) -> Splits:
    """Split images 6 : 1 : 1 into train, val and test. The same names are split the same way on
    every machine."""
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    n_held_out = max(1, len(shuffled) // 8)
    val, test = shuffled[:n_held_out], shuffled[n_held_out : 2 * n_held_out]
    return {"train": shuffled[2 * n_held_out :], "val": val, "test": test}


def check_splits(splits: Splits, captions: Captions) -> None:
    """Raise `InputError` if a split is empty, or if an image in a split has no caption or is listed
    twice."""
    names = [name for split in splits.values() for name in split]
    if not all(splits.values()):
        empty = " and ".join(split for split, listed in splits.items() if not listed)
        raise InputError(f"there are no images for {empty}; is the source complete (--source)?")
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{name} is in the splits {count} times; list it once, in one split")
        if not captions.get(name):
            raise InputError(
                f"{name} is in a split, but has no caption; is the source complete (--source)?"
            )


def warn_of_other_numbers(splits: Splits, captions: Captions) -> None:
    """Warn if the numbers of images or captions are not those of Flickr8k."""
    names = [name for split in splits.values() for name in split]
    other = [name for name in names if len(captions[name]) != CAPTIONS_PER_IMAGE]
    if other:
        _warn(
            f"images without exactly {CAPTIONS_PER_IMAGE} captions: {len(other):,}, for example "
            f"{other[0]}"
        )
    counts = {split: len(listed) for split, listed in splits.items()}
    if counts != OFFICIAL_COUNTS:
        _warn(f"found {_in_words(counts)}, but Flickr8k has {_in_words(OFFICIAL_COUNTS)}")


def prepare(
    root: Path, sources: Iterable[Path] = (), download: bool = False, language: str = "en"
) -> dict[str, int]:
    """Write Flickr8k from `sources`, or a data set of one's own, to the folder `root`; return the
    number of images by split. `language` is that of the captions.

    With `download`, what the sources lack is downloaded to `root / "downloads"`. Files that are in
    `root` already are kept: images that have the same size as in the source, and annotations with
    the same content. Raises `InputError` if anything is missing or cannot be read or written, and
    if `root` holds the annotations of another data set, which are never overwritten.
    """
    sources = list(sources)
    sizes = {path.name: path.stat().st_size for path in (root / "images").glob("*")}
    present = {name: size for name, size in sizes.items() if size}  # a power cut leaves empty files
    with ExitStack() as open_zips:
        found = find_files(sources, open_zips)
        files = by_name(found, root)
        if not download and files.keys().isdisjoint({KARPATHY, *CAPTION_READERS}):
            own = read_own(found, root, named=sources)
            if own:
                return write_own(root, own, language)
        if download and not has_official_splits(files):
            files = by_name(_zip_members(_download(TEXT_ZIP, root), open_zips), root) | files
        captions, splits = read_source(files, present.keys() | files.keys())
        captions = {name: [text for text in texts if text] for name, texts in captions.items()}
        check_splits(splits, captions)
        warn_of_other_numbers(splits, captions)
        annotations = {
            root / f"{language}_{split}.json": annotations_json(
                (f"images/{name}", captions[name]) for name in sorted(names)
            )
            for split, names in splits.items()
        }
        refuse_another_set(annotations)

        needed = [name for names in splits.values() for name in names]
        files = {n: SourceFile(root / "images" / n, size) for n, size in present.items()} | files
        if download and not files.keys() >= set(needed):
            files = by_name(_zip_members(_download(IMAGES_ZIP, root), open_zips), root) | files
        if missing := [name for name in needed if name not in files]:
            raise InputError(
                f"{len(missing):,} of {len(needed):,} images are in none of the sources, for "
                f"example {missing[0]}; name the folder or zip that holds them with --source, "
                "or add --download"
            )
        write_set(
            root,
            images=[f"images/{name}" for name in needed if present.get(name) != files[name].size],
            write_image=lambda _, path: path.write_bytes(files[path.name].read_bytes()),
            annotations=annotations,
            progress="writing the images",
        )
    return {split: len(names) for split, names in splits.items()}


def write_own(root: Path, own: OwnSet, language: str) -> dict[str, int]:
    """Write a data set of one's own to the folder `root`, as `prepare` does with Flickr8k."""
    if root.resolve() == Path(__file__).resolve().parent:
        raise InputError(
            "captions of your own go into a folder of their own: add --output FOLDER; images that "
            "lie in FOLDER are not copied"
        )
    splits = own.splits
    if splits is None:
        splits = split_at_random(own.captions.keys())
        _warn(
            f"the {len(own.captions):,} images are split at random into train, val and test; to "
            "choose yourself, add a column split that says train, val or test, or give a file of "
            "captions for each, called so"
        )
    check_splits(splits, own.captions)
    write_set(
        root,
        images=[
            image
            for image, file in sorted(own.files.items())
            if not ((root / image).is_file() and (root / image).stat().st_size == file.size)
        ],
        write_image=lambda image, path: path.write_bytes(own.files[image].read_bytes()),
        annotations={
            root / f"{language}_{split}.json": annotations_json(
                (image, own.captions[image]) for image in sorted(images)
            )
            for split, images in splits.items()
        },
        progress="writing the images",
    )
    return {split: len(images) for split, images in splits.items()}


def _download(name: str, root: Path) -> Path:
    """The path of an official zip, which is downloaded if it is not there yet."""
    from models.weights.download import Unavailable, download

    try:
        return download(f"{RELEASE}/{name}", root / "downloads" / name, MD5[name])
    except Unavailable as error:
        raise InputError(
            "--download: name a copy that you have, of Kaggle too (Images and captions.txt, as a "
            f"folder or a zip), with --source instead\n{error}"
        ) from None


def _in_words(counts: dict[str, int]) -> str:
    train, val, test = (f"{counts.get(split, 0):,}" for split in SPLIT_LISTS)
    return f"{train} training, {val} validation and {test} test images"


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    parser = scripts.ArgumentParser(
        description="Turn Flickr8k into the files that train.py reads: images/*.jpg and\n"
        "en_{train,val,test}.json, with the official splits; or do so with captions of yours.\n"
        "Files that are there already are not written again. Flickr8k is for non-commercial\n"
        "research and education.",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="download what no source holds to OUTPUT/downloads (1.1 GB without any source); an "
        f"interrupted download is continued; {IMAGES_ZIP} may be deleted in the end",
    )
    parser.add_argument(
        "--source",
        type=scripts.path,
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"folders, zips or files that hold Flickr8k: {IMAGES_ZIP} and {TEXT_ZIP} or what they "
        f"unpack to, the Kaggle copy (archive.zip: Images and {KAGGLE}; add {TEXT_ZIP} or "
        f"--download for the official splits), or Karpathy's {KARPATHY} and the images; or images "
        "of yours with captions as CSV, TSV, JSON lines, COCO or a list",
    )
    parser.add_argument(
        "--output",
        type=scripts.writable_folder,
        default=Path(__file__).resolve().parent,
        help="folder to write into (default: the folder of this script)",
    )
    parser.add_argument(
        "--language", choices=["en", "cn"], default="en", help="of the captions (default: en)"
    )
    args = parser.parse_args()
    if not (args.download or args.source):
        parser.error("say where to get Flickr8k: --download, or --source PATH if you have it")
    counts = prepare(args.output, args.source, args.download, args.language)
    print(f"data set in {args.output}: {_in_words(counts)}")


if __name__ == "__main__":
    run_script(main)
