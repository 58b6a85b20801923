"""Retrieval scores from features: `score_features` against a sort of every query's scores.

    python tests/benchmarks/evaluation.py

Features are random: an image, and five captions near it. First, where a sort is still bearable,
both take turns and their R@K are checked to be the same; the sort knows neither mAP@K nor ties.
Then `score_features` alone on growing sets, each in a process of its own: time, and memory
beyond the features. Memory is read from /proc: Linux only.
"""

import argparse
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from measure import (
    alternate,
    check,
    describe_cpu,
    extra_peak_megabytes,
    in_a_process,
    print_table,
    times_as_fast,
)
from torch import Tensor

from models.host import run_script
from utils.retrieval.scores import K_VALUES, score_features

CAPTIONS = 5
DIMENSIONS = 512
NOISE = 7.0  # by which about half of 1,000 images find one of their captions first
Truth = dict[int, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--compared", type=int, default=1000, metavar="IMAGES",
        help="images where both run (default: %(default)s)")  # fmt: skip
    add("--images", type=int, nargs="*", default=[1000, 5000, 31000],
        help="sizes for ours alone (default: 1000 5000 31000)")  # fmt: skip
    add("--rounds", type=int, default=5, help="runs of each that count (default: %(default)s)")
    args = parser.parse_args()

    print(describe_cpu())
    compare(args.compared, args.rounds)
    rows = []
    for images in args.images:
        seconds, megabytes = in_a_process(measure_alone, images)
        scores = images * CAPTIONS * images  # in each of two directions
        rows.append(
            [
                f"{images:,} images, {CAPTIONS * images:,} captions",
                f"{seconds:.2f}",
                f"{1e9 * seconds / (2 * scores):.1f}",
                f"{megabytes:.0f}",
                f"{4 * scores / 2**20:,.0f}",
            ]
        )
    print_table(
        ["ours alone", "s", "ns/score", "extra peak MB", "MB of all scores of a direction"], rows
    )


def compare(images: int, rounds: int) -> None:
    features, truth = random_features(images), ground_truth(images)
    results: dict[str, dict] = {}

    def ours(_) -> None:
        results["ours"] = score_features(*features, *truth)

    def theirs(_) -> None:
        results["theirs"] = recalls_by_sorting(*features, *truth)

    seconds = alternate({"ours": ours, "a sort a query": theirs}, range(rounds + 1))
    differences = [
        abs(getattr(results["ours"], way).recall[k] - results["theirs"][way][k])
        for way in results["theirs"]
        for k in K_VALUES
    ]
    check(f"R@K, {format_recalls(results['theirs'])}:", differences, 1e-6)
    print()
    print_table(
        [f"{images:,} images, {CAPTIONS * images:,} captions", "s", "ours: times as fast"],
        (
            [name, f"{median(values):.3f}", times_as_fast(seconds["ours"], values)]
            for name, values in seconds.items()
        ),
    )


def random_features(images: int) -> tuple[Tensor, Tensor]:
    """Normalised features of images `[n, 512]` and of five captions near each `[5 n, 512]`."""
    random = torch.Generator().manual_seed(0)
    image_features = F.normalize(torch.randn(images, DIMENSIONS, generator=random), dim=-1)
    text_features = torch.randn(images * CAPTIONS, DIMENSIONS, generator=random)
    text_features.mul_(NOISE / DIMENSIONS**0.5)
    text_features.view(images, CAPTIONS, -1).add_(image_features[:, None])
    return image_features, F.normalize(text_features, dim=-1, out=text_features)


def ground_truth(images: int) -> tuple[Truth, dict[int, int]]:
    img2txt = {i: list(range(CAPTIONS * i, CAPTIONS * (i + 1))) for i in range(images)}
    return img2txt, {text: image for image, texts in img2txt.items() for text in texts}


def recalls_by_sorting(
    image_features: Tensor, text_features: Tensor, img2txt: Truth, txt2img: dict[int, int]
) -> dict[str, dict[int, float]]:
    """R@K in percent by the definition: the whole gallery is sorted for every query."""
    scores = (image_features @ text_features.T).numpy()
    recalls = {}
    for way, rows, truth in (("i2t", scores, img2txt), ("t2i", scores.T, txt2img)):
        best = np.empty(len(rows))
        for query, row in enumerate(rows):
            order = np.argsort(row)[::-1]
            right = np.atleast_1d(truth[query])
            best[query] = min(np.flatnonzero(order == column)[0] for column in right)
        recalls[way] = {k: 100 * (best < k).mean() for k in K_VALUES}
    return recalls


def format_recalls(recalls: dict[str, dict[int, float]]) -> str:
    return ", ".join(
        f"{way} {'/'.join(f'{value:.1f}' for value in values.values())}"
        for way, values in recalls.items()
    )


def measure_alone(images: int) -> tuple[float, float]:
    """Seconds, and MB at the peak beyond those before, of one evaluation."""
    features, truth = random_features(images), ground_truth(images)
    score_features(*random_features(8), *ground_truth(8))  # loads what is loaded on first use
    start = time.perf_counter()
    megabytes = extra_peak_megabytes(lambda: score_features(*features, *truth))
    return time.perf_counter() - start, megabytes


if __name__ == "__main__":
    run_script(main)
