"""Turn Flickr8k, or your own captions, into the files that train.py reads:
images/*.jpg and en_{train,val,test}.json. Files that are there already are not
written again.

    python flickr8k/prepare.py --download
    python flickr8k/prepare.py --source Flickr8k_Dataset.zip Flickr8k_text.zip
    python flickr8k/prepare.py --source my_data --output my_data

The sources hold the images, and captions and splits in one of these formats:

1. the official captions and splits of Flickr8k_text.zip;
2. dataset_flickr8k.json, Karpathy's file of captions and splits (or _flickr30k,
   _coco);
3. your own captions (the captions.txt of the Kaggle copy is such a table) as
   CSV, TSV, JSON lines, COCO, Parquet or a list: one file,
   which is split by its column split (train, val, test) or at random, or a file
   for each, called train, val and test; or without a list, split at random: a
   folder of tar shards (00000.tar, ... of img2dataset), of images beside texts
   (1.jpg, 1.txt), of class folders, or of Hugging Face's datasets. Images in
   the output folder stay there, others are copied to images/; shards and tables
   with images have to be in it.

Flickr8k (Hodosh, Young, Hockenmaier 2013) is for non-commercial research and
education.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path

if not __package__:  # as a script: Python looks for modules in this folder, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flickr8k.own_captions import Captions, Copied, Splits, read_own
from flickr8k.sources import FileIndex, SourceFile, find_files, zip_members
from models import scripts
from models.errors import InputError
from models.host import run_script
from utils.data.annotations import annotations_json, image_path, refuse_another_set, write_set
from utils.data.caption_formats import SPLIT_WORDS

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
TOKENS = "Flickr8k.token.txt"
OFFICIAL = (TOKENS, *SPLIT_LISTS.values())
KARPATHYS = [f"dataset_{name}.json" for name in ("flickr8k", "flickr30k", "coco")]


def read_tokens(file: SourceFile) -> Captions:
    """The official captions, one a line: `name.jpg#0<TAB>caption`."""
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


def read_karpathy(file: SourceFile) -> tuple[Captions, Splits]:
    """Captions and splits from Karpathy's JSON file."""
    captions: Captions = {}
    splits: Splits = {split: [] for split in SPLIT_LISTS}
    text = file.read_text()
    try:
        for image in json.loads(text)["images"]:
            name = image["filename"].strip()
            splits[SPLIT_WORDS[image["split"]]].append(name)  # COCO has "restval"
            captions[name] = [sentence["raw"].strip() for sentence in image["sentences"]]
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: is not Karpathy's JSON: images with filename, split, sentences ({error!r})"
        ) from None
    return captions, splits


def karpathys_file(files: FileIndex) -> SourceFile | None:
    return next(filter(None, map(files.named, KARPATHYS)), None)


def read_official(files: FileIndex) -> tuple[Captions, Splits, Copied] | None:
    """Captions and official splits, or None; `InputError` for only some of the official files."""
    missing = [name for name in OFFICIAL if not files.named(name)]
    if not missing:
        captions = read_tokens(files.named(TOKENS))
        lists = {split: files.named(name).read_text() for split, name in SPLIT_LISTS.items()}
        splits = {split: names.split() for split, names in lists.items()}
    elif file := karpathys_file(files):
        captions, splits = read_karpathy(file)
    elif len(missing) < len(OFFICIAL):
        raise InputError(f"no {', '.join(missing)}; add --source {TEXT_ZIP} or --download")
    else:
        return None
    captions = {f"images/{name}": texts for name, texts in captions.items()}
    splits = {split: [f"images/{name}" for name in names] for split, names in splits.items()}
    return captions, splits, {}


def check_splits(splits: Splits, captions: Captions) -> None:
    """Raise `InputError` for an empty split, and an image without caption or listed twice."""
    if not all(splits.values()):
        empty = " and ".join(split for split, listed in splits.items() if not listed)
        raise InputError(f"there are no images for {empty}; is the source complete (--source)?")
    for name, count in Counter(chain.from_iterable(splits.values())).items():
        if count > 1:
            raise InputError(f"{name} is in the splits {count} times; list it once, in one split")
        if not captions.get(name):
            raise InputError(f"{name} has a split, no caption; is the source complete (--source)?")


def prepare(
    root: Path, sources: Iterable[Path] = (), download: bool = False, language: str = "en"
) -> dict[str, int]:
    """Write Flickr8k, or your own data set, from `sources` to the folder `root`; return the number
    of images by split. With `download`, what the sources lack comes to `root / "downloads"`. Images
    of the same size stay. Raises `InputError` for unusable files, and as `write_set` does."""
    sources = list(sources)
    with ExitStack() as open_zips:
        found = find_files(sources, open_zips)
        files = FileIndex((file for file in found if not file.below(root / "images")), root)
        if download and not (all(map(files.named, OFFICIAL)) or karpathys_file(files)):
            files.add(zip_members(_download(TEXT_ZIP, root), open_zips))
        official = read_official(files)
        captions, splits, copied = official or read_own(found, root, sources, language)
        captions = {image: [text for text in texts if text] for image, texts in captions.items()}
        check_splits(splits, captions)
        annotations = {
            root / f"{language}_{split}.json": _annotations(images, captions)
            for split, images in splits.items()
        }
        refuse_another_set(annotations)
        there = [path for path in (root / "images").rglob("*") if path.is_file()]
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in there}
        if official:
            images = [*chain.from_iterable(splits.values())]
            if download and not all(sizes.get(image) or files.named(image) for image in images):
                files.add(zip_members(_download(IMAGES_ZIP, root), open_zips))
            copied = {image: file for image in images if (file := files.named(image))}
            if missing := [i for i in images if not (sizes.get(i) or i in copied)]:
                raise InputError(
                    f"{len(missing):,} of {len(images):,} images are in none of the sources, for "
                    f"example {missing[0]}; name what holds them with --source, or add --download"
                )
        write_set(
            root,
            images=[i for i, file in copied.items() if sizes.get(i) != file.size],
            write_image=lambda image, path: path.write_bytes(copied[image].read_bytes()),
            annotations=annotations,
            progress="writing the images",
        )
    return {split: len(images) for split, images in splits.items()}


def _annotations(images: list[str], captions: Captions) -> bytes:
    """The content of the caption file of `images`."""
    for image in images:
        with suppress(ValueError):
            if image_path(image) == image:
                continue
        raise InputError(f"{image}: this name cannot be used everywhere; rename the image")
    return annotations_json((image, captions[image]) for image in sorted(images))


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


def main() -> None:
    parser = scripts.ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--download", action="store_true",
        help="download what no source holds to OUTPUT/downloads (1.1 GB without any source); an "
             f"interrupted download is continued; {IMAGES_ZIP} may be deleted in the end")
    add("--source", type=scripts.path, nargs="+", default=[], metavar="PATH",
        help="folders, zips or files that hold images, and captions as listed above; to the Kaggle "
             f"copy (archive.zip) add {TEXT_ZIP} or --download for the official splits")
    add("--output", type=scripts.writable_folder, default=Path(__file__).resolve().parent,
        help="folder to write into (default: the folder of this script)")
    add("--language", choices=["en", "cn"], default="en", help="of the captions (default: en)")
    # fmt: on
    args = parser.parse_args()
    if not (args.download or args.source):
        parser.error("say where to get Flickr8k: --download, or --source PATH if you have it")
    counts = prepare(args.output, args.source, args.download, args.language)
    train, val, test = (f"{counts.get(split, 0):,}" for split in SPLIT_LISTS)
    print(f"data set in {args.output}: {train} training, {val} validation and {test} test images")


if __name__ == "__main__":
    run_script(main)
