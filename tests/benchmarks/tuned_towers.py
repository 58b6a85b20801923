"""Which rate suits towers that know photographs already? Fine-tuning after `real_towers.py`.

    python tests/benchmarks/tuned_towers.py --dataset_path flickr8k --seeds 0 1

The towers that `real_towers.py` has aligned on 4,000 photographs (in the same `--output`) learn
whole, from the 1,500 training photographs that it left over, at each of `--rates` and with each
of `--distill`. The same 500 photographs choose the epoch and the mixture. Reported is the mean
recall on Flickr8k's validation images, which choose nothing; the lowest validation score of any
epoch, below the first one or not; and what is kept: the mean recall on 1,000 of the 4,000.
"""

import csv
import json
import random
import shutil
from itertools import product
from pathlib import Path

from measure import print_table
from photographs import share_images
from real_towers import make_data
from runs import add_data, build_parser, mean_recall, once, over_seeds, score, train

from models import load
from models.host import run_script
from models.run_files import run_weights
from utils.data.annotations import annotations_json, read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.runs.arguments import integer, number, positive

KEPT = 1000  # of the images that the towers were aligned on
FINE_TUNING = ["--batch_size", 64, "--wise_ft", 1, "--freq", 1000, "--device", "cpu"]


def main() -> None:
    parser = build_parser(__doc__, output="logs/real_towers")
    add_data(parser)
    add = parser.add_argument
    add("--images", type=integer(2), default=4000, help="aligned on (default: %(default)s)")
    add("--epochs", type=integer(1), default=5, help="(default: %(default)s)")
    add("--rates", type=positive, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4])
    add("--distill", type=number(), nargs="+", default=[0.0])
    args = parser.parse_args()

    data = make_tuning_data(args.dataset_path, args.output, args.images)
    before = [scores_before(args.output, seed, data) for seed in args.seeds]
    rows = [["before", *(over_seeds(row[name] for row in before) for name in before[0])]]
    for rate, distill in product(args.rates, args.distill):
        after = [fine_tune(args, seed, data, rate, distill) for seed in args.seeds]
        name = f"{rate:g}, --distill {distill:g}"
        rows.append([name, *(over_seeds(row[column] for row in after) for column in after[0])])
    print_table(["mean recall, %", *before[0]], rows)


def make_tuning_data(dataset_path: Path, output: Path, images: int) -> dict[str, Path]:
    """The folders to fine-tune on and to score forgetting on. What `make_data` took is what the
    towers have seen; the rest of the training images is new to them."""
    aligned = make_data(dataset_path, output / "data", images)
    seen = read_annotations(aligned / "en_train.json")
    choosing = read_annotations(aligned / "en_val.json")
    taken = {image for image, _ in (*seen, *choosing)}
    new = [e for e in read_annotations(dataset_path / "en_train.json") if e[0] not in taken]
    kept = random.Random(1).sample(seen, min(KEPT, len(seen)))
    folders = {"new": (new, choosing), "kept": (choosing, kept)}
    for name, (training, validation) in folders.items():
        folder = output / name
        folder.mkdir(parents=True, exist_ok=True)
        share_images(dataset_path / "images", folder / "images")
        (folder / "en_train.json").write_bytes(annotations_json(training))
        (folder / "en_val.json").write_bytes(annotations_json(validation))
    shutil.copyfile(dataset_path / "en_val.json", output / "new" / "en_test.json")
    return {name: output / name for name in folders}


def aligned_weights(output: Path, seed: int) -> Path:
    return run_weights(next((output / str(seed)).glob("*/R_mAP.png")).parent)


def scores_before(output: Path, seed: int, data: dict[str, Path]) -> dict[str, float]:
    weights = aligned_weights(output, seed)
    return once(output / f"before {seed}.json", lambda: scores_of(weights, data))


def fine_tune(args, seed: int, data: dict[str, Path], rate: float, distill: float) -> dict:
    folder = args.output / f"tuned {seed}" / f"{rate:g} {distill:g} {args.epochs}"

    def compute() -> dict[str, float]:
        run = train(
            folder, "--resume_training", aligned_weights(args.output, seed),
            "--dataset_path", data["new"], "--seed", seed, "--epochs", args.epochs,
            "--lr", rate, "--distill", distill, "--cache", args.output / "cache", *FINE_TUNING,
        )  # fmt: skip
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            recalls = [float(row["mean_recall"]) for row in csv.DictReader(file)]
        return {
            **scores_of(
                run_weights(run), data, json.loads((run / "test_metrics.json").read_text())
            ),
            "validation, first": recalls[0],
            "validation, lowest": min(recalls),
            "validation, last": recalls[-1],
        }

    return once(folder / "scores.json", compute)


def scores_of(weights: Path, data: dict[str, Path], on_test: dict | None = None) -> dict:
    model, _ = load(weights, "cpu")

    def recall(name: str, split: str) -> float:
        dataset = Flickr8kDataset(data[name], split=split)
        dataset.prepare_for(model)
        return mean_recall(score(model, dataset))

    return {
        "test": mean_recall(on_test) if on_test else recall("new", "test"),
        "kept": recall("kept", "val"),
    }


if __name__ == "__main__":
    run_script(main)
