"""Retrieval scores: Recall@K, mAP@K and ranks, images to texts and texts to images.

As a script, it scores weights on validation or test images:

    python utils/metric.py                        the newest run, on its own data
    python utils/metric.py --weights ViT-B/32 --dataset_path flickr8k --split test
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from models.files import check_writable
from models.host import run_script
from models.run_files import TrainedOn, run_folder, trained_on
from models.scripts import ArgumentParser, from_here, writable_file
from utils.data.annotations import caption_file, missing_annotations
from utils.flickr8k_dataloader import ALIKE, Flickr8kDataset
from utils.machine.precision import Precision
from utils.retrieval.encode import encode_set
from utils.retrieval.plots import plot_metrics
from utils.retrieval.ranking import RowsOf, blocks, ground_truth, rows_both_ways
from utils.retrieval.report import write_report
from utils.retrieval.tables import K_VALUES, Metrics, format_table
from utils.runs.arguments import add_scoring, path, picture
from utils.runs.checkpoint import write_json
from utils.runs.chosen import add_weights, weights_to_use

MANY_TRUTHS = 8  # of a query; for more, sorting its scores is faster than a pass for each


def compute_metrics(
    scores_i2t: Tensor | np.ndarray,
    img2txt: Mapping[int, int | list[int]],
    scores_t2i: Tensor | np.ndarray,
    txt2img: Mapping[int, int | list[int]],
    k_values: Iterable[int] = K_VALUES,
) -> Metrics:
    """Scores of retrieval in both directions, from similarities.

    scores_i2t  `[images, texts]`, the higher the more alike
    img2txt     indices of the right texts of each image
    scores_t2i  `[texts, images]`
    txt2img     index of the right image of each text, or a list of several

    Returns `{"i2t": {...}, "t2i": {...}}`, each with, for every K of `k_values`, in percent:

    R@K    share of queries with at least one ground truth among the first K
    mAP@K  mean over the queries of: the sum of precision@position over the ground truths found
           among the first K, divided by min(number of ground truths, K)

    and `median_rank` and `mean_rank` (from 1) of the best-placed ground truth. Ties count against
    the model: a ground truth stands after everything with the same score that is not one. For a K
    larger than the gallery, R@K is 100 and mAP@K the same as for K = the gallery's size.

    Raises `InputError` for a NaN, a query without ground truth or with one twice, shapes that do
    not match, or a K that is no positive integer.
    """
    scores_i2t, scores_t2i = _floats(scores_i2t), _floats(scores_t2i)
    if scores_i2t.ndim != 2 or scores_t2i.shape != scores_i2t.shape[::-1]:
        raise InputError(
            f"scores_i2t {[*scores_i2t.shape]} should be [images, texts], and scores_t2i "
            f"{[*scores_t2i.shape]} [texts, images]"
        )
    k_values = _positive_integers(k_values)
    return {
        "i2t": _score(lambda rows: scores_i2t[rows], *scores_i2t.shape, img2txt, k_values),
        "t2i": _score(lambda rows: scores_t2i[rows], *scores_t2i.shape, txt2img, k_values),
    }


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    img2txt: Mapping[int, int | list[int]],
    txt2img: Mapping[int, int | list[int]],
    k_values: Iterable[int] = K_VALUES,
) -> Metrics:
    """`compute_metrics` of the similarities between features `[images, d]` and `[texts, d]`, which
    are computed block by block, so that memory does not grow with their number."""
    images, texts = len(image_features), len(text_features)
    k_values = _positive_integers(k_values)
    rows_of = rows_both_ways(image_features, text_features)
    return {
        "i2t": _score(rows_of["i2t"], images, texts, img2txt, k_values),
        "t2i": _score(rows_of["t2i"], texts, images, txt2img, k_values),
    }


def _floats(scores: Tensor | np.ndarray) -> Tensor:
    scores = torch.as_tensor(scores)
    return scores if scores.is_floating_point() else scores.double()


def _positive_integers(k_values: Iterable[int]) -> tuple[int, ...]:
    k_values = tuple(k_values)
    for k in k_values:
        if not isinstance(k, Integral) or isinstance(k, bool) or k < 1:
            raise InputError(f"k_values: {k!r} is no positive integer")
    return k_values


def _score(
    rows_of: RowsOf,
    queries: int,
    gallery: int,
    truth: Mapping[int, int | list[int]],
    k_values: tuple[int, ...],
) -> dict[str, float]:
    """The metrics of one direction; `rows_of(rows)` gives these rows of the scores."""
    columns = ground_truth(truth, queries, gallery)
    positions = [_positions(rows_of(rows), columns[rows]) for rows in blocks(queries, gallery)]
    return _summarize(torch.cat(positions), k_values)


def _positions(scores: Tensor, columns: Tensor) -> Tensor:
    """Positions `[q, most]` (from 1, ascending) of the ground truths `columns` `[q, most]` when
    each row of `scores` `[q, gallery]` is ranked; infinite where a query has fewer."""
    if scores.amax().isnan():
        raise InputError("the scores hold NaN: the features of this model are not finite")
    columns = columns.to(scores.device)
    absent = columns < 0
    own = scores.gather(1, columns.clamp(min=0)).masked_fill(absent, -torch.inf)
    own = own.sort(dim=1, descending=True, stable=True).values  # stable: the absent stay last
    most = own.shape[1]
    if most > MANY_TRUTHS:
        as_high = scores.shape[1] - torch.searchsorted(scores.sort(dim=1).values.contiguous(), own)
    else:
        counts = [(scores >= t).sum(dim=1, dtype=torch.int32) for t in own.split(1, dim=1)]
        as_high = torch.stack(counts, dim=1)
    own_as_high = most - torch.searchsorted(own.flip(1), own)
    own_as_high = own_as_high.minimum((~absent).sum(dim=1, keepdim=True))
    # Before a ground truth stand all others that score as high, and the better ground truths.
    positions = as_high - own_as_high + torch.arange(1, most + 1, device=scores.device)
    return positions.cpu().double().masked_fill(absent.cpu(), torch.inf)


def _summarize(positions: Tensor, k_values: tuple[int, ...]) -> dict[str, float]:
    found = positions.isfinite()
    truths = found.sum(dim=1)
    precision = found.cumsum(dim=1) / positions
    scores = {}
    for k in k_values:
        scores[f"R@{k}"] = 100 * (positions[:, 0] <= k).double().mean().item()
    for k in k_values:
        gained = (precision * (positions <= k)).sum(dim=1)
        scores[f"mAP@{k}"] = 100 * (gained / truths.clamp(max=k)).mean().item()
    scores["median_rank"] = float(np.median(positions[:, 0]))
    scores["mean_rank"] = positions[:, 0].mean().item()
    return scores


def mean_recall(metrics: Metrics) -> float:
    """The mean of all R@K in both directions: what decides which epoch is the best."""
    return float(np.mean([v for s in metrics.values() for k, v in s.items() if k.startswith("R@")]))


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        description="Score a CLIP on captioned images: Recall@K and mAP@K in both directions."
    )
    parser.add_argument(
        "--dataset_path",
        type=path,
        help="folder of the data (default: what the weights' run was trained on, else flickr8k "
        "beside the scripts)",
    )
    parser.add_argument(
        "--language",
        nargs="+",
        choices=["en", "cn"],
        help="of the captions, one or both (default: those of the weights' run, else en)",
    )
    parser.add_argument(
        "--split", choices=["val", "test"], default="val", help="images to score (default: val)"
    )
    add_weights(parser)
    add_scoring(parser)
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="write the metrics, K from 1 to 10"
    )
    parser.add_argument(
        "--plot",
        type=picture,
        metavar="FILE",
        help="write the plot of both against K, e.g. R_mAP.png (default: R_mAP_<split>.png in the "
        "newest run, if --weights is left out)",
    )
    parser.add_argument(
        "--report",
        type=writable_file,
        metavar="FILE",
        help="write a page to look at: scores, curves, and what was found for each query, e.g. "
        "report.html",
    )
    parser.add_argument(
        "--plain_protocol",
        action="store_true",
        help="a caption is right for its own image alone, also where others have the same; to "
        "compare with scores of other programs",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()

    from models.clip_utils import load

    weights = weights_to_use(args.weights)
    dataset_path, languages = data_to_score_on(args, weights)
    plot = args.plot
    if not (plot or args.weights) and run_folder(weights):
        plot = weights.parents[1] / f"R_mAP_{args.split}.png"
        check_writable(plot)
    dataset = Flickr8kDataset(
        dataset_path, language=languages, plain_protocol=args.plain_protocol, split=args.split
    )
    model, _ = load(weights, args.device, activation=args.activation)
    dataset.prepare_for(model)
    dataset.check_texts()
    precision = Precision(model.device, args.use_amp)
    features = encode_set(model, dataset, args.batch_size, args.num_workers, precision)
    metrics = retrieval_metrics(*features, dataset.img_to_txt, dataset.txt_to_img, range(1, 11))
    print(f"{dataset_path}: {len(dataset)} images, {len(dataset.text)} captions "
          "(percent; ranks from 1)")  # fmt: skip
    if shared := dataset.count_shared_captions():
        print(f"{shared} of the captions belong to several images, each a right answer "
              "(--plain_protocol: its own image alone)")  # fmt: skip
    if alike := dataset.count_alike_captions():
        print(f"warning: {alike} captions are different texts, but {ALIKE}")
    print(format_table(metrics, args.split))
    if args.json:
        write_json(args.json, metrics)
        print(f"metrics written to {args.json}")
    if plot:
        plot_metrics(metrics, plot)
        print(f"plot written to {plot}")
    if args.report:
        write_report(args.report, weights, dataset, features, metrics)
        print(f"report written to {args.report}: open it in a browser")


def data_to_score_on(args: argparse.Namespace, weights: str | Path) -> TrainedOn:
    """The data that the command line names, or else that the weights were trained on. Raises
    `InputError` if the captions of the split are missing."""
    run = None if args.dataset_path and args.language else trained_on(weights)
    run = run or TrainedOn(from_here("flickr8k"), ["en"])
    dataset_path = args.dataset_path or run.dataset_path
    languages = list(dict.fromkeys(args.language or run.languages))
    for language in languages:
        missing = missing_annotations(caption_file(dataset_path, language, args.split))
        if missing:
            raise InputError(
                f"{missing}; name the data to score on with --dataset_path and --language"
            )
    return TrainedOn(dataset_path, languages)


if __name__ == "__main__":
    run_script(main)
