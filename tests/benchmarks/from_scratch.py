"""The same small model from scratch: our train.py beside open_clip's training program.

    pip install 'open_clip_torch[training]'
    python tests/benchmarks/from_scratch.py --dataset_path flickr8k

Both train ViT-demo (64 pixels, QuickGELU) on all training images and see the same number of them:
ours shows each once an epoch, with two captions drawn anew; open_clip reads CSV data with a row a
caption, so that one of its epochs is five of ours. The first seed tries open_clip with what its
manual gives for CSV data (lr 1e-3, weight decay 0.1) and with its program's defaults (5e-4, 0.2);
the better by mean recall goes on with the other seeds. Its warm-up of 10,000 steps, more than there
are here, becomes the share of the run that ours takes, and its text tower reads as many tokens as
the longest caption has, which changes no output and spares it half of its time. The final weights
of both are scored by `utils.metric`.

Beside English, ours trains on the Chinese captions, and on both languages at once. Settings are
chosen on the validation images. All runs are kept in `--output`; none is trained again.
"""

import argparse
import csv
from pathlib import Path

from measure import print_table
from runs import RECALL_NAMES, build_parser, call, once, over_seeds, recalls, score, train

from models import load
from models.errors import run_script
from models.weights.registry import CONFIGS
from utils.data.annotations import read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.metric import mean_recall
from utils.retrieval.tables import Metrics
from utils.runs.arguments import integer
from utils.runs.checkpoint import write_json
from utils.runs.files import replaced_whole

MODEL = "ViT-demo"
BATCH = 128  # of open_clip, as its manual has it
WARMUP = 0.1  # share of the run, as in train.py
OPEN_CLIP = {
    "lr 1e-3, decay 0.1": ["--lr", 1e-3, "--wd", 0.1],
    "lr 5e-4, decay 0.2": ["--lr", 5e-4, "--wd", 0.2],
}
MAIN = (  # open_clip_train.main takes no model but those that are registered
    "import sys, open_clip; from open_clip_train.main import main; "
    "open_clip.add_model_config(sys.argv[1]); main(sys.argv[2:])"
)


def main() -> None:
    parser = build_parser(__doc__, output="logs/from_scratch")
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
    tried = {name: [train_open_clip(args, name, first)] for name in OPEN_CLIP}
    best = max(tried, key=lambda name: mean_recall(tried[name][0]["en"]))
    tried[best] += [train_open_clip(args, best, seed) for seed in others]
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


def train_open_clip(args: argparse.Namespace, name: str, seed: int) -> dict[str, Metrics]:
    """Scores of the last weights on English."""
    folder = args.output / "open_clip" / name

    def compute() -> dict[str, Metrics]:
        rows = write_csv(args.dataset_path, args.output / "train.csv")
        config = write_model_config(
            args.output / f"{MODEL}.json", longest_caption(args.dataset_path)
        )
        epochs = args.epochs // 5
        steps = epochs * (rows // BATCH)
        call(
            *("-c", MAIN, config, "--model", MODEL),
            *("--train-data", args.output / "train.csv", "--dataset-type", "csv"),
            *("--batch-size", BATCH, "--epochs", epochs, "--warmup", round(WARMUP * steps)),
            *("--workers", 0, "--device", "cpu", "--precision", "fp32", "--seed", seed),
            *("--logs", folder, "--name", seed, "--resume", "latest", *OPEN_CLIP[name]),
        )
        weights = folder / str(seed) / "checkpoints" / f"epoch_{epochs}.pt"
        return score_weights(weights, args.dataset_path, ["en"])

    return once(folder / f"{seed}.json", compute)


def write_csv(dataset_path: Path, file: Path) -> int:
    """A row for every caption, as open_clip reads them: filepath, tab, title. Returns their
    number."""
    rows = [
        (dataset_path.resolve() / image, caption)
        for image, captions in read_annotations(dataset_path / "en_train.json")
        for caption in captions
    ]
    with replaced_whole(file) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, delimiter="\t")
        writer.writerow(("filepath", "title"))
        writer.writerows(rows)
    return len(rows)


def longest_caption(dataset_path: Path) -> int:
    """Tokens of the longest English caption, start and end included."""
    sets = (Flickr8kDataset(dataset_path, is_train=is_train) for is_train in (True, False))
    return max(int(data.tokens.argmax(dim=1).max()) + 1 for data in sets)


def write_model_config(file: Path, context_length: int) -> Path:
    """The architecture as open_clip describes one; its name is that of the file."""
    config = CONFIGS[MODEL]
    description = {
        "embed_dim": config.embed_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": config.image_resolution,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "patch_size": config.vision_patch_size,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": config.vocab_size,
            "width": config.transformer_width,
            "heads": config.transformer_heads,
            "layers": config.transformer_layers,
        },
    }
    write_json(file, description)
    return file


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
