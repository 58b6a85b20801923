"""Zero-shot prediction: probabilities of labels for images (Radford et al. 2021,
section 3.1).

  python predict_zero_shot.py photo.jpg --labels "a dog" "a cat"
  python predict_zero_shot.py photos --labels "a dog" "a cat" --csv answers.csv
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError
from models.host import run_script
from models.scripts import ArgumentParser, from_here
from utils.data.templates import TEMPLATE_SETS, read_templates
from utils.runs.answers import write_answers
from utils.runs.arguments import add_loading, answer_file, fraction, name_or_path
from utils.runs.default_weights import weights_to_use

LABELS = ["two line charts", "a schematic diagram", "a landscape photo", "a oil painting"]
DIGITS = 6  # significant, of probabilities and similarities in files
COUNTED = 5  # labels whose images are counted


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("image", nargs="?", default=from_here("R_mAP.png"), metavar="IMAGE",
        help="an image, or with --csv a folder of images, with all its subfolders (default: "
        "%(default)s)")
    add("--labels", nargs="+", default=LABELS, metavar="LABEL",
        help=f"the labels to choose from (default: {', '.join(LABELS)})")
    add("--templates", type=name_or_path, default="none", metavar="SET_OR_FILE",
        help="sentences around a label, whose features are averaged: "
        f"{', '.join(TEMPLATE_SETS)} (cn: Chinese), or a file with one a line and {{}} for the "
        "label (default: %(default)s, the label alone)")
    add("--csv", type=answer_file, metavar="FILE",
        help="write a row an image, with the probability and the similarity of each label; as "
        "JSON lines if FILE ends in .jsonl")
    add("--threshold", type=fraction, metavar="T",
        help="judge each label on its own, so that several or none may hold: a label holds whose "
        "cosine similarity to the image is at least T, such as 0.25 (a SigLIP: whose own "
        "probability is)")
    # fmt: on
    add_loading(parser)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    templates = read_templates(args.templates)
    folder = Path(args.image).expanduser()
    if folder.is_dir() and not args.csv:
        raise InputError(f"{args.image}: a folder; add --csv FILE for the answers on its images")

    import torch

    from models.clip_utils import find_weights, load
    from models.preprocess import open_image
    from models.tokens import first_alike
    from utils.classification import zero_shot_classifier
    from utils.data.image_files import find_images
    from utils.machine.precision import Precision
    from utils.retrieval.search import image_features

    images = find_images(folder) if folder.is_dir() else [args.image]
    image = None if folder.is_dir() else open_image(args.image)
    weights = find_weights(weights_to_use(args.weights))
    model, preprocess = load(weights, args.device, activation=args.activation)
    for i, first in enumerate(first_alike(model.tokenizer, args.labels, model.context_length)):
        if first < i:  # they would share one probability
            labels = f"{args.labels[i]!r} repeats {args.labels[first]!r}"
            raise InputError(f"--labels: {labels}; leave one of them out")
    precision = Precision(model.device, args.use_amp)
    with torch.inference_mode():
        with precision.autocast():
            text_features = zero_shot_classifier(model, args.labels, templates)
            if image is not None:
                pixels = preprocess(image)[None].to(model.device)
                features = model.encode_image(pixels, normalize=True)
        if image is None:
            images, features = image_features(model, weights, folder, images, precision)
            images = [folder / found for found in images]
            features = features.to(model.device).float()
        similarities = features @ text_features.T
        probs = model.probabilities(similarities)

    if image is not None:
        show(args.labels, probs.cpu().numpy())
    if model.logit_bias is not None:
        print("each label has a probability of its own (sigmoid): they need not add up to 1, and "
              "where all are low, none of the labels fits")  # fmt: skip
    elif len(args.labels) == 1 and image is not None:
        print("a single label has no rival, so that its probability is 1 whatever the image shows; "
              f"its similarity is {similarities.item():.3f}")  # fmt: skip
    if args.threshold is None:
        found = [[args.labels[best]] for best in similarities.argmax(dim=1)]
    else:
        judged = similarities if model.logit_bias is None else probs
        found = [[args.labels[i] for i in row.nonzero()[:, 0]] for row in judged >= args.threshold]
    if image is None:
        counts = Counter(label for labels in found for label in labels or ["none of them"])
        print("images:", ", ".join(f"{n:,} {label}" for label, n in counts.most_common(COUNTED)))
    elif args.threshold is not None:
        print(f"labels that hold at {args.threshold:g}: {', '.join(found[0]) or 'none of them'}")
    if args.csv:
        scores = probs.tolist(), similarities.tolist()
        write_answers(args.csv, answer_rows(args.labels, images, found, *scores))
        print(f"answers for {len(images):,} images written to {args.csv}")


def answer_rows(
    labels: list[str],
    images: list[str | Path],
    found: list[list[str]],
    probs: list[list[float]],
    similarities: list[list[float]],
) -> Iterator[dict[str, object]]:
    """The row of each image: the labels found, and the scores of all `labels`."""
    for image, own, *scores in zip(images, found, probs, similarities, strict=True):
        probability, similarity = (
            {label: float(f"{x:.{DIGITS}g}") for label, x in zip(labels, row, strict=True)}
            for row in scores
        )
        yield {"image": str(image), "labels": own, "probability": probability,
               "similarity": similarity}  # fmt: skip


def show(labels: list[str], probs) -> None:
    """Print the probabilities `[1, labels]` of an image, a NumPy array, in three formats."""
    ranked = sorted(zip(labels, probs[0], strict=True), key=lambda pair: -pair[1])
    best_label, best_prob = ranked[0]
    print("Label probs:", probs)
    print(f"{best_label}: {best_prob.item()}")
    print(f"image 0: [{', '.join(f'({label!r}, {prob!s})' for label, prob in ranked)}]")


if __name__ == "__main__":
    run_script(main)
