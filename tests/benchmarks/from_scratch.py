"""The same small model from scratch: our train.py beside open_clip's training program.

    pip install 'open_clip_torch[training]'
    python tests/benchmarks/from_scratch.py --dataset_path flickr8k

Both train ViT-demo (64 pixels, QuickGELU) on all training images and see the same number of them:
ours shows each once an epoch, with two captions drawn anew; open_clip reads CSV data with a row a
caption, so that one of its epochs is five of ours. The first seed tries open_clip with what its
manual gives for CSV data (lr 1e-3, weight decay 0.1) and with its program's defaults (5e-4, 0.2);
the better by mean recall goes on with the other seeds. The final weights of both are scored by
`utils.metric`.

Beside English, ours trains on the Chinese captions, and on both languages at once. Settings are
chosen on the validation images. All runs are kept in `--output`; none is trained again.
"""

import argparse
from pathlib import Path

from measure import print_table
from open_clip_training import MODEL, train_open_clip
from runs import (
    RECALL_NAMES,
    Metrics,
    add_data,
    build_parser,
    mean_recall,
    once,
    over_seeds,
    recalls,
    score,
    train,
)

from models import load
from models.host import run_script
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.runs.arguments import integer
from utils.runs.checkpoint import write_json

BATCH = 128  # of open_clip, as its manual has it
OPEN_CLIP = {
    "lr 1e-3, decay 0.1": ["--lr", 1e-3, "--wd", 0.1],
    "lr 5e-4, decay 0.2": ["--lr", 5e-4, "--wd", 0.2],
}


def main() -> None:
    parser = build_parser(__doc__, output="logs/from_scratch")
    add_data(parser)
    add = parser.add_argument
    # fmt: off
    add("--epochs", type=integer(5), default=10,
        help="of ours, a multiple of 5; open_clip takes a fifth (default: %(default)s)")
    add("--ours", default="", metavar="ARGUMENTS",
        help="of train.py in place of its defaults, in quotes: --ours='--lr 1e-3'")
    add("--languages", nargs="+", default=["en", "cn", "en cn"], metavar="LANGUAGES",
        help="each trained on apart (default: en cn 'en cn')")
    # fmt: on
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    results = {
        f"ours, {languages}": [train_ours(args, languages, seed) for seed in args.seeds]
        for languages in args.languages
    }
    first, *others = args.seeds
    tried = {name: [train_theirs(args, name, first)] for name in OPEN_CLIP}
    best = max(tried, key=lambda name: mean_recall(tried[name][0]["en"]))
    tried[best] += [train_theirs(args, best, seed) for seed in others]
    results |= {f"open_clip, {name}": scores for name, scores in tried.items()}
    write_json(args.output / "from_scratch.json", results)
    print_results(results)
    print(f"every seed: {args.output / 'from_scratch.json'}")


def train_ours(args: argparse.Namespace, languages: str, seed: int) -> dict[str, Metrics]:
    """Scores of the last weights on each of the languages."""
    log_dir = args.output / f"ours {languages}" / str(seed)

    def compute() -> dict[str, Metrics]:
        run = train(
            log_dir,
            *("--resume_training", "none", "--model", MODEL, "--dataset_path", args.dataset_path),
            *("--language", *languages.split(), "--epochs", args.epochs, "--seed", seed),
            *("--cache", args.output / "cache", *args.ours.split()),
        )
        weights = run / "weights" / "last_epoch_weights.pth"
        return score_weights(weights, args.dataset_path, languages.split())

    return once(log_dir / "scores.json", compute)


def train_theirs(args: argparse.Namespace, name: str, seed: int) -> dict[str, Metrics]:
    """Scores of the last weights of open_clip on English."""
    folder = args.output / "open_clip" / name

    def compute() -> dict[str, Metrics]:
        weights = train_open_clip(
            args.dataset_path, folder, str(seed), *OPEN_CLIP[name],
            batch_size=BATCH, epochs=args.epochs // 5, seed=seed,
        )  # fmt: skip
        return score_weights(weights, args.dataset_path, ["en"])

    return once(folder / f"{seed}.json", compute)


def score_weights(weights: Path, dataset_path: Path, languages: list[str]) -> dict[str, Metrics]:
    model, _ = load(weights, "cpu", activation="quick_gelu")
    side = model.visual.input_resolution
    return {
        language: score(model, Flickr8kDataset(dataset_path, side, language, is_train=False))
        for language in languages
    }


def print_results(results: dict[str, list[dict[str, Metrics]]]) -> None:
    rows = []
    for name, seeds in results.items():
        for language in seeds[0]:
            columns = zip(*(recalls(scores[language]) for scores in seeds), strict=True)
            rows.append([name, language, str(len(seeds)), *map(over_seeds, columns)])
    print("\npercent, mean ± standard deviation over the seeds\n")
    print_table(["trained by, on", "scored on", "seeds", *RECALL_NAMES], rows)


if __name__ == "__main__":
    run_script(main)
