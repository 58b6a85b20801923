"""Rank captions by how well they describe an image, or search a folder of images;
draw the result.

captions for an image:
  python predict.py photo.jpg --text "a dog runs" "a cat sleeps"
  python predict.py photo.jpg   ranks the validation captions of the run
  python predict.py             asks for images, until an empty line

images for a text, or like another image:
  python predict.py photos --text "two dogs in the snow" "a red car"
  python predict.py photos --similar photo.jpg

features of images, or of texts, for other programs:
  python predict.py photos --features photos.npy
  python predict.py --captions_file texts.txt --features texts.npy
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from models.errors import InputError
from models.files import check_writable_folder, read_lines
from models.host import run_script
from models.run_files import run_folder, trained_on
from models.scripts import ArgumentParser
from utils.runs.arguments import add_loading, feature_file, path, picture
from utils.runs.default_weights import weights_to_use

TOP = 5  # captions printed and drawn
FIRST = 10  # images printed and drawn
THUMBNAIL = (480, 480)  # pixels of a drawn image, at most
NAME_LENGTH = 60  # characters, at most 240 bytes: with a number they fit every file system


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    # fmt: off
    parser.add_argument("image", nargs="?", metavar="IMAGE",
        help="an image (default: you are asked for it), or a folder to search, with all its "
        "subfolders")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--text", nargs="+", metavar="CAPTION",
        help="captions to rank; with a folder, texts to search for")
    add("--captions_file", type=path, metavar="FILE", help="the same in a file, one a line")
    add("--similar", metavar="IMAGE", help="with a folder, search for images like this one")
    parser.add_argument("--output", type=picture, metavar="FILE",
        help="picture of the result to write (default: in predictions/ in the run's folder)")
    parser.add_argument("--features", type=feature_file, metavar="FILE",
        help="write the features of a folder's images, or of the lines of --captions_file, in "
        "this order: FILE.npy and the names in FILE.names.txt, or FILE.parquet")
    # fmt: on
    add_loading(parser)
    args = parser.parse_args()

    if args.output and not args.image:
        raise InputError("--output is for one picture; name the IMAGE as well")
    image = Path(args.image).expanduser() if args.image else None
    if args.features:
        save_features(args, image)
    elif image and image.is_dir():
        search(args, image)
    elif image and not image.exists():
        raise InputError(f"{args.image}: no such image file or folder")
    elif args.similar:
        raise InputError("--similar searches a folder of images: name the folder")
    else:
        caption(args)


def load_for(args: argparse.Namespace, name: str | Path) -> tuple:
    """The weights' file, their model and the precision."""
    from models.clip_utils import find_weights, load
    from utils.machine.precision import Precision

    weights = find_weights(name)
    model, _ = load(weights, args.device, activation=args.activation)
    return weights, model, Precision(model.device, args.use_amp)


def caption(args: argparse.Namespace) -> None:
    """Print and draw the best captions for the image, or for each that the user names."""
    from models.preprocess import open_image
    from utils.retrieval.encode import cached_caption_features, distinct, encode_texts
    from utils.retrieval.plots import draw_ranking
    from utils.retrieval.ranking import rank_captions
    from utils.retrieval.search import encode_pixels

    if args.image:
        open_image(args.image)  # to refuse a bad image before weights are loaded
    name = weights_to_use(args.weights)
    captions = list(dict.fromkeys(args.text or read_captions(args.captions_file, name)))
    predictions = output_folder(name)
    weights, model, precision = load_for(args, name)
    captions = distinct(captions, model)
    if model.logit_bias is not None:
        print("each caption has a probability of its own: they need not add up to 100%")
    elif len(captions) == 1:
        print("a single caption has no rival, so that its probability is 100%: see its similarity")
    if args.text:
        with precision.autocast():
            text_features = encode_texts(model, model.tokenize(captions, truncate=True))
    else:
        source = str(args.captions_file.resolve()) if args.captions_file else "validation"
        text_features = cached_caption_features(model, weights, source, captions, precision)

    for file in [args.image] if args.image else ask_for_images():
        try:
            image = open_image(file)
            with precision.autocast():
                (own,) = encode_pixels(model, [model.preprocess.resize_and_crop(image)])
            ranked = rank_captions(captions, text_features, own, model)[:TOP]
            output = args.output or new_picture(predictions, Path(file).stem)
            for place, (text, probability, similarity) in enumerate(ranked, 1):
                print(f"{place}. {probability:7.2%}  similarity {similarity:.3f}  {text}")
            draw_ranking(image, ranked, output)
            print(f"picture: {output}")
        except InputError as error:
            if args.image:
                raise
            print(f"error: {error}")


def search(args: argparse.Namespace, folder: Path) -> None:
    """Print and draw the images of a folder that are most similar to each text, or to an image."""
    from models.preprocess import open_image
    from utils.data.image_files import find_images
    from utils.retrieval.encode import distinct, encode_texts
    from utils.retrieval.plots import draw_found
    from utils.retrieval.search import encode_pixels, image_features, most_similar

    if not (args.text or args.captions_file or args.similar):
        raise InputError(f"{folder}: a folder; say what to search for: --text or --similar IMAGE")
    similar = [open_image(args.similar)] if args.similar else []
    images = find_images(folder)
    name = weights_to_use(args.weights)
    texts = [] if args.similar else args.text or read_captions(args.captions_file, name)
    if args.output and len(texts) > 1:
        raise InputError("--output is for one picture; give one text to search for")
    predictions = output_folder(name)
    weights, model, precision = load_for(args, name)
    texts = distinct(texts, model)
    images, features = image_features(model, weights, folder, images, precision)
    with precision.autocast():
        if args.similar:
            queries = encode_pixels(model, list(map(model.preprocess.resize_and_crop, similar)))
        else:
            queries = encode_texts(model, model.tokenize(texts, truncate=True))

    titles = [f"like {Path(args.similar).name}"] if args.similar else texts
    for title, query in zip(titles, queries, strict=True):
        shown = [(image, "the query") for image in similar]
        found = [
            (images[i], similarity)
            for i, similarity in most_similar(features, query, FIRST + len(similar))
            if not (args.similar and Path(args.similar).expanduser().samefile(folder / images[i]))
        ]
        print(title)
        for place, (image, similarity) in enumerate(found[:FIRST], 1):
            print(f"{place:2}. similarity {similarity:.3f}  {folder / image}")
            picture = open_image(folder / image)
            picture.thumbnail(THUMBNAIL)
            shown.append((picture, f"{place}. {similarity:.3f} {image}"))
        name = f"{folder.resolve().name[: NAME_LENGTH // 2]} {title}"
        output = args.output or new_picture(predictions, re.sub(r"\W+", "_", name).strip("_"))
        draw_found(title, shown, output)
        print(f"picture: {output}")


def save_features(args: argparse.Namespace, folder: Path | None) -> None:
    """Write the features of a folder's images, or of the lines of a file."""
    from utils.data.image_files import find_images
    from utils.retrieval.encode import cached_caption_features, count_cut
    from utils.retrieval.feature_files import write_features
    from utils.retrieval.search import image_features

    if args.text or args.similar or args.output or bool(folder) == bool(args.captions_file):
        raise InputError("--features takes a FOLDER of images or a --captions_file, nothing else")
    if folder and not folder.is_dir():
        raise InputError(f"{args.image}: no such folder; --features takes a folder of images")
    names = find_images(folder) if folder else read_lines(args.captions_file, "caption")
    weights, model, precision = load_for(args, weights_to_use(args.weights))
    if folder:
        images, features = image_features(model, weights, folder, names, precision)
        names = [str(folder / image) for image in images]
    else:
        count_cut(names, model)
        source = str(args.captions_file.resolve())
        features = cached_caption_features(model, weights, source, names, precision)
    code = write_features(args.features, names, features)
    print(f"{len(names):,} features written to {args.features}; to read them:\n{code}")


def read_captions(captions_file: Path | None, weights: str | Path) -> list[str]:
    """The lines of a file, or the validation captions of the run of `weights`, or `InputError`."""
    from utils.data.annotations import caption_file, missing_annotations, read_annotations

    if captions_file:
        return read_lines(captions_file, "caption")
    trained = trained_on(weights)
    if trained is None:
        raise InputError(f"{weights}: not of a run of train.py: add --text or --captions_file")
    captions = []
    for language in trained.languages:
        validation = caption_file(trained.dataset_path, language, "val")
        if missing := missing_annotations(validation):
            raise InputError(f"{missing}, of the weights' run; add --text or --captions_file")
        captions += read_annotations(validation, "val", language).captions
    return captions


def output_folder(weights: str | Path) -> Path:
    """`predictions/` in the folder of the weights' run, or else in the current folder. Raises
    `InputError` if it cannot be written."""
    folder = (run_folder(weights) or Path.cwd()) / "predictions"
    check_writable_folder(folder)
    return folder


def new_picture(folder: Path, name: str) -> Path:
    """A new file in `folder` for a picture, with a number if there is one of this name."""
    name = name[:NAME_LENGTH]
    names = chain([name], (f"{name}_{number}" for number in count(2)))
    return next(file for name in names if not (file := folder / f"{name}.png").exists())


def ask_for_images() -> Iterator[str]:
    """The paths that the user types, until an empty line or the end of the input."""
    with suppress(EOFError):
        while path := input("image path (empty to stop): ").strip().strip("'\""):
            yield path


if __name__ == "__main__":
    run_script(main)
