"""Zero-shot prediction: probabilities of labels for an image (Radford et al. 2021, section 3.1).

python predict_zero_shot.py photo.jpg --labels "a dog" "a cat"
"""

from models.errors import InputError
from models.host import run_script
from models.scripts import ArgumentParser, from_here
from utils.data.templates import TEMPLATE_SETS, read_templates
from utils.runs.arguments import add_loading, name_or_path
from utils.runs.default_weights import add_weights, weights_to_use

LABELS = ["two line charts", "a schematic diagram", "a landscape photo", "a oil painting"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("image", nargs="?", default=from_here("R_mAP.png"), metavar="IMAGE",
        help="default: %(default)s")
    add("--labels", nargs="+", default=LABELS, metavar="LABEL", help="default: %(default)s")
    add("--templates", type=name_or_path, default="none", metavar="SET_OR_FILE",
        help="sentences around a label, whose features are averaged: "
        f"{', '.join(TEMPLATE_SETS)} (cn: Chinese), or a file with one a line and {{}} for the "
        "label (default: %(default)s, the label alone)")
    # fmt: on
    add_weights(parser)
    add_loading(parser)
    args = parser.parse_args()
    templates = read_templates(args.templates)

    import torch

    from models import load
    from models.preprocess import open_image
    from utils.classification import zero_shot_classifier
    from utils.machine.precision import Precision

    image = open_image(args.image)
    weights = weights_to_use(args.weights)
    model, preprocess = load(weights, args.device, activation=args.activation)
    check_labels(args.labels, model.tokenizer)
    with torch.inference_mode():
        with Precision(model.device, args.use_amp).autocast():
            text_features = zero_shot_classifier(model, args.labels, templates)
            images = preprocess(image)[None].to(model.device)
            image_features = model.encode_image(images, normalize=True)
        similarities = image_features @ text_features.T
        probs = model.probabilities(similarities).cpu().numpy()

    ranked = sorted(zip(args.labels, probs[0], strict=True), key=lambda pair: -pair[1])
    best_label, best_prob = ranked[0]
    print("Label probs:", probs)
    print(f"{best_label}: {best_prob.item()}")
    print(f"image 0: [{', '.join(f'({label!r}, {prob!s})' for label, prob in ranked)}]")
    if model.logit_bias is not None:
        print("each label has a probability of its own (sigmoid): they need not add up to 1, and "
              "where all are low, none of the labels fits")  # fmt: skip
    elif len(args.labels) == 1:
        print("a single label has no rival, so that its probability is 1 whatever the image shows; "
              f"its similarity is {similarities.item():.3f}")  # fmt: skip


def check_labels(labels: list[str], tokenizer) -> None:
    """Raise `InputError` for an empty label, and for two labels with the same tokens: they would
    share one probability."""
    same: dict[tuple[int, ...], str] = {}
    for label in labels:
        tokens = tuple(tokenizer.encode(label))
        if not tokens:
            raise InputError("--labels: one of the labels is empty")
        if tokens in same:
            raise InputError(f"--labels: {label!r} repeats {same[tokens]!r}; leave one of them out")
        same[tokens] = label


if __name__ == "__main__":
    run_script(main)
