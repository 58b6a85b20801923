"""Accuracy of image classification: zero-shot, and with a linear probe on image
features (Radford et al. 2021, sections 3.1 and 3.2).

As a script, it scores weights on class folders, or on a set of torchvision:

  python utils/classification.py --data my_images --plot confusion.png
  python utils/classification.py --data my_images --linear_probe --csv a.csv
  python utils/classification.py --weights ViT-B/32 --data cifar10
"""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from itertools import compress
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError, one_line
from models.host import run_script
from models.progress_bar import progress_bar
from models.scripts import ArgumentParser, writable_file
from models.tokens import first_alike
from utils.data.labelled_images import LabelledImages, find_labelled_images
from utils.data.templates import TEMPLATE_SETS, read_templates
from utils.data.torchvision_sets import TORCHVISION_SETS
from utils.machine.memory import explained
from utils.machine.processes import ALONE, Processes
from utils.retrieval.encode import encode_images, encode_texts
from utils.retrieval.tables import format_rows
from utils.runs.answers import write_answers
from utils.runs.arguments import add_scoring, answer_file, name_or_path, path, picture
from utils.runs.default_weights import weights_to_use

HELD_OUT = 5  # of so many training images one is held out to choose the probe's C
ITERATIONS = 1000  # of L-BFGS at most, as in the paper
TITLES = ("top-1", "top-5", "mean per class")


class Accuracy(NamedTuple):
    """Accuracy of predicted classes, in percent."""

    top1: float  # share of images whose class is ranked first
    top5: float  # among the first five
    mean_per_class: float  # mean of `per_class` over the classes that have images
    per_class: list[float]  # top-1; NaN if a class has no images
    confusion: Tensor  # numbers of images `[c, c]`, by class (rows) and predicted class (columns)


class Features(NamedTuple):
    """Normalised features `[n, d]` of images, on the model's device, and their labels `[n]`."""

    images: Tensor
    labels: Tensor
    paths: Sequence[str] = ()  # of the images; needed for `answers`


def zero_shot_classifier(
    model: CLIP,
    labels: Sequence[str],
    templates: Sequence[str] = ("{}",),
    processes: Processes = ALONE,
) -> Tensor:
    """Normalised class embeddings `[labels, d]`, on the model's device: the mean of a label's
    normalised features in all templates (Radford et al. 2021, section 3.1.4). Raises `InputError`
    for texts longer than the model's context."""
    texts = [template.replace("{}", label) for label in labels for template in templates]
    features = encode_texts(model, model.tokenize(texts), processes)
    if len(templates) == 1:
        return features  # not normalised twice: the same bits as the model's own
    return F.normalize(features.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)


def readable_features(
    model: CLIP,
    images: LabelledImages,
    batch_size: int = 64,
    num_workers: int = 0,
    processes: Processes = ALONE,
) -> Features:
    """The features of all readable images; a line names each of the others."""
    features = encode_images(model, images, batch_size, num_workers, processes)
    readable = features.any(dim=1)
    paths = list(compress(images.image, readable.tolist()))
    return Features(features[readable], torch.tensor(images.label)[readable.cpu()], paths)


def accuracy(scores: Tensor, labels: Tensor) -> Accuracy:
    """The accuracy of `scores` `[n, c]` for `labels` `[n]`; of equal scores the lower index ranks
    first. Raises `InputError` for a NaN, and if there are no images."""
    scores, labels = scores.cpu(), labels.cpu()
    if not len(labels):
        raise InputError("nothing to score: there are no images that can be read")
    if scores.amax().isnan():
        raise InputError("the scores hold NaN: the features of this model are not finite")
    classes = scores.shape[1]
    own = scores.gather(1, labels[:, None])
    lower = torch.arange(classes) < labels[:, None]
    before = ((scores > own) | ((scores == own) & lower)).sum(dim=1)
    pairs = classes * labels + scores.argmax(dim=1)
    confusion = pairs.bincount(minlength=classes**2).view(classes, classes)
    per_class = 100 * confusion.diagonal().double() / confusion.sum(dim=1)
    return Accuracy(
        100 * (before < 1).double().mean().item(),
        100 * (before < 5).double().mean().item(),
        per_class.nanmean().item(),
        per_class.tolist(),
        confusion,
    )


def linear_probe(train: Features, features: Tensor, classes: Sequence[str]) -> tuple[Tensor, float]:
    """The logits `[n, c]` of scikit-learn's logistic regression, trained on `train`, for `features`
    `[n, d]`, and the `C` of `choose_c`. Raises `InputError` for a class without training images."""
    inputs, labels = train.images.cpu().numpy(), train.labels.numpy()
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        name = classes[counts.argmin()]
        raise InputError(f"{name!r}: there is no training image of this class to read; add some")
    c = choose_c(inputs, labels)
    scores = _fitted(c, inputs, labels).decision_function(features.cpu().numpy())
    if scores.ndim == 1:  # of two classes it returns the second one's logit alone
        scores = np.stack([0 * scores, scores], axis=1)
    return torch.from_numpy(scores), c


def choose_c(features: np.ndarray, labels: np.ndarray) -> float:
    """The `C` (inverse regularization strength) from 1e-6 to 1e6 with the best accuracy on
    `held_out` images after training on the others; of equals the smallest. Steps of a factor of
    100, then smaller ones around the best, down to 10^(1/8) (appendix A.3)."""
    held = held_out(labels)
    found: dict[float, float] = {}  # {exponent of 10: accuracy}
    exponents: list[float] = [-6, -4, -2, 0, 2, 4, 6]
    with progress_bar(total=15, desc="choosing C of the probe") as bar:
        for step in (1, 1 / 2, 1 / 4, 1 / 8, 0):
            for exponent in exponents:
                if abs(exponent) <= 6:
                    probe = _fitted(10**exponent, features[~held], labels[~held])
                    found[exponent] = probe.score(features[held], labels[held])
                bar.update()
            best = max(found, key=lambda exponent: (found[exponent], -exponent))
            exponents = [best - step, best + step]
    return 10**best


def held_out(labels: np.ndarray) -> np.ndarray:
    """Which training images are held out to choose `C`, bool `[n]`: a fifth of each class, but at
    least one of two. Raises `InputError` if no class has two."""
    held = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(0)
    for number in np.unique(labels):
        own = random.permutation(np.flatnonzero(labels == number))
        held[own[: max(len(own) // HELD_OUT, len(own) > 1)]] = True
    if not held.any():
        raise InputError("--linear_probe: no class has two training images, to choose C; add some")
    return held


def _fitted(c: float, features: np.ndarray, labels: np.ndarray):
    from sklearn.linear_model import LogisticRegression  # takes a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge, as in the paper
        return LogisticRegression(C=c, max_iter=ITERATIONS).fit(features, labels)


def chance(classes: int) -> list[float]:
    """The expected mean scores of a random guess, in percent."""
    one = 100 / classes
    return [one, min(5 * one, 100), one]


def as_json(found: dict[str, Accuracy], classes: Sequence[str]) -> dict[str, Any]:
    """The scores for a file; `per_class` is null where a class has no images."""
    names = Accuracy._fields[:3]
    of_chance = dict(zip(names, chance(len(classes)), strict=True))
    content: dict[str, Any] = {"classes": list(classes), "chance": of_chance}
    for way, a in found.items():
        content["images"] = int(a.confusion.sum())
        per_class = [None if isnan(share) else share for share in a.per_class]
        scores = dict(zip(names, a[:3], strict=True)) | {"per_class": per_class}
        content[way.replace(" ", "_").replace("-", "_")] = scores
    return content


def answers(
    scored: Features, probabilities: dict[str, Tensor], classes: Sequence[str]
) -> Iterator[dict[str, object]]:
    """A row for each image: its class, and for each method, by its `probabilities` `[n, c]`, the
    prediction and its probability; of one method as columns without its name."""
    best = {way: p.max(dim=1) for way, p in probabilities.items()}
    for i, (file, label) in enumerate(zip(scored.paths, scored.labels.tolist(), strict=True)):
        row: dict[str, object] = {"path": file, "label": classes[label]}
        for way, (probability, prediction) in best.items():
            end = f" of the {way}" if len(best) > 1 else ""
            row[f"prediction{end}"] = classes[prediction[i]]
            row[f"probability{end}"] = round(probability[i].item(), 6)
        yield row


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--data", type=name_or_path, required=True, metavar="FOLDER_OR_NAME",
        help="folder of class folders, or one with train/ and val/ (or valid/ or test/) that have "
        "class folders in them; or a data set of torchvision, downloaded to torchvision_data/ "
        f"beside the scripts: {', '.join(TORCHVISION_SETS)}")
    add("--classnames", type=path, metavar="FILE",
        help="names of the classes, one a line in the order of the sorted class folders (2 before "
        "10), lines folder<TAB>name or 'folder name', or ImageNet's class index in JSON (default: "
        "the words in the folders' names, or the data set's names)")
    add("--templates", type=name_or_path, metavar="SET_OR_FILE",
        help="sentences around a class name, whose features are averaged: "
        f"{', '.join(TEMPLATE_SETS)} (cn: Chinese), or a file with one a line and {{}} for the "
        "name (default: photo, for a Chinese model cn_photo)")
    add("--linear_probe", action="store_true",
        help="also score a logistic regression, trained on the image features of train/ (or "
        "torchvision's training images)")
    add_scoring(parser)
    add("--json", type=writable_file, metavar="FILE", help="write the scores, also of each class")
    add("--csv", type=answer_file, metavar="FILE",
        help="write a row an image: path, label, prediction, its probability; as JSON lines if "
        "FILE ends in .jsonl")
    add("--plot", type=picture, metavar="FILE", help="write a picture of the confusion matrix")
    # fmt: on
    return parser


@explained()
def main() -> None:
    args = build_parser().parse_args()

    from models.clip_utils import load
    from utils.machine.precision import Precision
    from utils.retrieval.plots import plot_confusion
    from utils.runs.checkpoint import write_json

    weights = weights_to_use(args.weights)
    templates = read_templates(args.templates) if args.templates else None
    source = find_labelled_images(args.data, names_file=args.classnames)
    if not args.classnames and all(re.fullmatch(r"n?\d+", name) for name in source.classes):
        print(
            f"hint: {source.classes[0]} is not a word, and neither are the other classes; give "
            "their names with --classnames (of ImageNet's synsets: LOC_synset_mapping.txt)"
        )
    train_source = args.linear_probe and find_labelled_images(
        args.data, is_train=True, names_file=args.classnames
    )
    model, preprocess = load(weights, args.device, activation=args.activation)
    alike = first_alike(model.tokenizer, source.classes, model.context_length)
    if repeated := [name for i, name in enumerate(source.classes) if alike[i] != i]:
        print(f"warning: several classes are called {one_line(repeated[0])}; only the first counts")

    templates = templates or TEMPLATE_SETS[model.text_tower.templates]
    precision = Precision(model.device, args.use_amp)
    source.preprocess = preprocess
    with precision.autocast():
        classifier = zero_shot_classifier(model, source.classes, templates)
        scored = readable_features(model, source, args.batch_size, args.num_workers)
    similarities = scored.images @ classifier.T
    found = {"zero-shot": accuracy(similarities, scored.labels)}
    probabilities = {"zero-shot": model.probabilities(similarities).cpu()}
    print(f"{source.name}: {len(scored.labels):,} images of {len(source.classes):,} classes, "
          f"templates: {len(templates)} (percent)")  # fmt: skip
    if train_source:
        train_source.preprocess = preprocess
        with precision.autocast():
            train = readable_features(model, train_source, args.batch_size, args.num_workers)
        scores, c = linear_probe(train, scored.images, source.classes)
        found["linear probe"] = accuracy(scores, scored.labels)
        probabilities["linear probe"] = scores.softmax(dim=1)
        print(f"linear probe: trained on {len(train.labels):,} images, C = {c:.3g}")
    rows = {way: a[:3] for way, a in found.items()} | {"chance": chance(len(source.classes))}
    print(format_rows({way: dict(zip(TITLES, row, strict=True)) for way, row in rows.items()}))
    if args.json:
        write_json(args.json, as_json(found, source.classes))
        print(f"scores written to {args.json}")
    if args.csv:
        write_answers(args.csv, answers(scored, probabilities, source.classes))
        print(f"answers for {len(scored.labels):,} images written to {args.csv}")
    if args.plot:
        plot_confusion({way: a.confusion for way, a in found.items()}, source.classes, args.plot)
        print(f"plot written to {args.plot}")


if __name__ == "__main__":
    run_script(main)
