"""Retrieval scores: recall at K, mAP at K and ranks, images to texts and texts to
images.

As a script, it scores weights on validation or test images:

  python utils/metric.py                    the newest run, on its own data
  python utils/metric.py --weights ViT-B/32 --dataset_path flickr8k --split test
"""

import argparse
import sys
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from models.host import run_script
from models.run_files import TrainedOn, trained_on
from models.scripts import ArgumentParser, from_here, writable_file
from utils.data.annotations import caption_file, missing_annotations
from utils.retrieval.ranking import Positives, Similarities
from utils.retrieval.scores import K_VALUES, Scores, score_direction
from utils.runs.arguments import add_scoring, path, picture
from utils.runs.default_weights import weights_to_use


def compute_metrics(
    scores_i2t: Tensor | np.ndarray,
    img2txt: Positives,
    scores_t2i: Tensor | np.ndarray,
    txt2img: Positives,
    k_values: Iterable[int] = K_VALUES,
) -> dict[str, dict[str, float]]:
    """Scores of retrieval in both directions, from similarities.

    scores_i2t  `[images, texts]`, the higher the more similar
    img2txt     {image index: indices of its positives, the texts that belong to it}
    scores_t2i  `[texts, images]`
    txt2img     {text index: index of its image, or a list of several}

    Returns `{"i2t": {...}, "t2i": {...}}`, each with, for every K of `k_values`, in percent:

    R@K    share of queries with at least one positive among the first K
    mAP@K  mean over the queries of: the sum of precision@position over the positives among the
           first K, divided by min(number of positives, K)

    and `median_rank` and `mean_rank` (from 1) of the best-ranked positive. Ties count against the
    model: a positive stands after every negative of the same score. For a K larger than the
    gallery, R@K is 100 and mAP@K the same as for K = the gallery's size.

    Raises `InputError` for a NaN, a query without positives or with one twice, shapes that do not
    match, or a K that is not a positive integer.
    """
    scores_i2t, scores_t2i = _floats(scores_i2t), _floats(scores_t2i)
    if scores_i2t.ndim != 2 or scores_t2i.shape != scores_i2t.shape[::-1]:
        raise InputError(
            f"scores_i2t {[*scores_i2t.shape]} should be [images, texts], and scores_t2i "
            f"{[*scores_t2i.shape]} [texts, images]"
        )
    k_values = tuple(k_values)
    for k in k_values:
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise InputError(f"k_values: {k!r} is not a positive integer")
    i2t, t2i = (Similarities(*s.shape, s.__getitem__) for s in (scores_i2t, scores_t2i))
    both = score_direction(i2t, img2txt, k_values), score_direction(t2i, txt2img, k_values)
    return Scores(*both).as_dict()


def _floats(scores: Tensor | np.ndarray) -> Tensor:
    scores = torch.as_tensor(scores)
    return scores if scores.is_floating_point() else scores.double()


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--dataset_path", type=path,
        help="folder of the data (default: what the weights' run was trained on, else flickr8k "
        "beside the scripts)")
    add("--language", nargs="+", choices=["en", "cn"],
        help="language of the captions, one or both (default: those of the weights' run, else en)")
    add("--split", choices=["val", "test"], default="val", help="images to score (default: val)")
    add_scoring(parser)
    add("--json", type=writable_file, metavar="FILE", help="write the scores, K from 1 to 10")
    add("--plot", type=picture, metavar="FILE", help="plot recall and mAP against K (R_mAP.png)")
    add("--report", type=writable_file, metavar="FILE",
        help="write an HTML page: scores, curves and the first answers to each query")
    add("--plain_protocol", action="store_true",
        help="a caption is a positive of its own image alone, even if other images have the same "
        "caption; to compare with scores of other programs")
    # fmt: on
    return parser


def main() -> None:
    args = build_parser().parse_args()

    from models.clip_utils import load
    from utils.flickr8k_dataloader import ALIKE, Flickr8kDataset
    from utils.machine.precision import Precision
    from utils.retrieval.encode import encode_set
    from utils.retrieval.plots import plot_scores
    from utils.retrieval.report import write_report
    from utils.retrieval.scores import score_features
    from utils.retrieval.tables import format_table
    from utils.runs.checkpoint import write_json

    weights = weights_to_use(args.weights)
    dataset_path, languages = data_to_score_on(args, weights)
    dataset = Flickr8kDataset(
        dataset_path, language=languages, plain_protocol=args.plain_protocol, split=args.split
    )
    model, _ = load(weights, args.device, activation=args.activation)
    dataset.prepare_for(model)
    precision = Precision(model.device, args.use_amp)
    features = encode_set(model, dataset, args.batch_size, args.num_workers, precision)
    scores = score_features(*features, dataset.img_to_txt, dataset.txt_to_img, range(1, 11))
    print(f"{dataset_path}: {len(dataset)} images, {len(dataset.text)} captions "
          "(percent; ranks from 1)")  # fmt: skip
    if shared := dataset.count_shared_captions():
        print(f"{shared} of the captions belong to several images, and are positives of each "
              "(--plain_protocol: of their own image alone)")  # fmt: skip
    if alike := dataset.count_alike_captions():
        print(f"warning: {alike} captions are different texts, but {ALIKE}")
    print(format_table(scores, args.split))
    if args.json:
        write_json(args.json, scores.for_json())
        print(f"scores written to {args.json}")
    if args.plot:
        plot_scores(scores, args.plot)
        print(f"plot written to {args.plot}")
    if args.report:
        write_report(args.report, weights, dataset, features, scores)
        print(f"report written to {args.report}: open it in a browser")


def data_to_score_on(args: argparse.Namespace, weights: str | Path) -> TrainedOn:
    """The data to score on: of the command line, else of the weights' run, else flickr8k/. Raises
    `InputError` for missing captions."""
    run = None if args.dataset_path and args.language else trained_on(weights)
    run = run or TrainedOn(from_here("flickr8k"), ["en"])
    dataset_path = args.dataset_path or run.dataset_path
    languages = list(dict.fromkeys(args.language or run.languages))
    for language in languages:
        if missing := missing_annotations(caption_file(dataset_path, language, args.split)):
            raise InputError(f"{missing}; name the data with --dataset_path and --language")
    return TrainedOn(dataset_path, languages)


if __name__ == "__main__":
    run_script(main)
