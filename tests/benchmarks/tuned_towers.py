"""Which rate suits towers that know photographs already? Fine-tuning after `real_towers.py`.

    pip install 'open_clip_torch[training]'
    python tests/benchmarks/tuned_towers.py --dataset_path flickr8k --seeds 0 1 2 3 4

The towers that `real_towers.py` has aligned (seed 0 in the same `--output`) learn whole from some
of the training photographs that it left over, by `train.py` with its defaults but for the rate, and
by open_clip's program on as many images. Some of the photographs that chose the aligned epoch
choose ours; of open_clip the last epoch counts. Reported are the mean recall on Flickr8k's
validation images, which choose nothing; what is kept, the mean recall on some photographs that the
towers were aligned on; and how far the lowest epoch lies above the start, on the images that
choose.
"""

import json
import random
import shutil
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from fine_tuning import spread
from matplotlib.axes import Axes
from measure import print_table
from open_clip_training import train_csv
from photographs import write_photographs
from runs import (
    add_data,
    add_jobs,
    build_parser,
    jobs,
    mean_recall,
    once,
    over_seeds,
    score,
    train,
    validation_recalls,
)

from models import load
from models.files import read_json, write_json
from models.host import run_script
from models.run_files import run_weights
from models.weights.interface import save_safetensors
from utils.data.annotations import read_annotations
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.plots import save_figure
from utils.runs.arguments import integer, positive

CHOOSING, KEPT = 250, 500  # images
BATCH = 64
TUNING = ("--wise_ft", 1, "--patience", 0, "--no_guard", "--freq", 1000, "--device", "cpu")
DISTILL = "--distill 6"
Scores = dict[str, float]


def main() -> None:
    parser = build_parser(__doc__, output="logs/real_towers")
    add_data(parser)
    add_jobs(parser)
    add = parser.add_argument
    add("--images", type=integer(BATCH), default=1000, help="to tune on (default: %(default)s)")
    add("--epochs", type=integer(1), default=5, help="(default: %(default)s)")
    add("--rates", type=positive, nargs="*", default=[6e-6, 2e-5, 6e-5, 2e-4])
    add(
        "--distill",
        type=positive,
        nargs="*",
        default=[2e-5],
        metavar="RATE",
        help="rates with --distill 6 (default: %(default)s)",
    )
    add("--open_clip", type=positive, nargs="*", default=[6e-6, 2e-5, 6e-5, 2e-4], metavar="RATE")
    args = parser.parse_args()

    data = make_tuning_data(args.dataset_path, args.output, args.images)
    start = run_weights(next((args.output / "0").glob("*/R_mAP.png")).parent)
    before = once(args.output / "before.json", lambda: scores_of(start, data, ("test", "val")))
    programs = (("ours", args.rates), (DISTILL, args.distill), ("open_clip", args.open_clip))
    settings = [(name, rate) for name, rates in programs for rate in rates]
    wanted = list(product(args.seeds, settings))  # every setting once, then the next seed
    bench = Bench(args.output, data, start, before, args.images, args.epochs)
    with jobs(args.jobs) as pool:
        found = pool.map(lambda each: bench.tune(each[0], *each[1]), wanted)
        scores = dict(zip(wanted, found, strict=True))
    rows = [["before", f"{before['test']:.2f}", f"{before['kept']:.2f}", ""]]
    for name, rate in settings:
        of_seeds = [scores[seed, (name, rate)] for seed in args.seeds]
        columns = (
            over_seeds(one[column] for one in of_seeds) if column in of_seeds[0] else ""
            for column in ("test", "kept", "lowest")
        )
        rows.append([f"{name}, {rate:g}", *columns])
    print_table(["mean recall, percent", "test", "kept", "lowest epoch, above the start"], rows)
    plot(before, scores, args.seeds, dict(programs), Path(__file__).with_suffix(".png"))


def plot(before: Scores, scores: dict, seeds: list[int], programs: dict, file: Path) -> None:
    """What is gained against what is kept, a line a program, rate by rate, with the standard
    deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.subplots()
    panel.plot(before["kept"], before["test"], "k*", markersize=12, label="before fine-tuning")
    for name, rates in programs.items():
        draw_rates(
            panel, name, {rate: [scores[seed, (name, rate)] for seed in seeds] for rate in rates}
        )
    panel.set(xlabel="kept: mean recall on photographs of the alignment, percent",
              ylabel="gained: mean recall on new photographs, percent")  # fmt: skip
    panel.legend()
    panel.grid(alpha=0.3)
    save_figure(figure, file)


def draw_rates(panel: Axes, label: str, by_rate: dict[float, list[Scores]]) -> None:
    """A line with a point a rate: the means of what is gained ("test") and kept over the seeds,
    with the standard deviation."""
    kept, gained = (
        [[one[what] for one in seeds] for seeds in by_rate.values()] for what in ("kept", "test")
    )
    means = [*map(mean, kept)], [*map(mean, gained)]
    panel.errorbar(
        *means, xerr=[*map(spread, kept)], yerr=[*map(spread, gained)], fmt="o-", label=label
    )
    for rate, place in zip(by_rate, zip(*means, strict=True), strict=True):
        panel.annotate(f"{rate:g}", place, textcoords="offset points", xytext=(6, 4))


def make_tuning_data(dataset_path: Path, output: Path, images: int) -> dict[str, Path]:
    """The folders to fine-tune on and to score forgetting on. What `real_towers.make_data` took is
    what the towers have seen; the rest of the training images is new to them."""
    seen = read_annotations(output / "data" / "en_train.json")
    choosing = read_annotations(output / "data" / "en_val.json")
    taken = {image for image, _ in (*seen, *choosing)}
    new = [e for e in read_annotations(dataset_path / "en_train.json") if e[0] not in taken]
    pick = random.Random(1).sample
    folders = {
        "new": (pick(new, min(images, len(new))), pick(choosing, min(CHOOSING, len(choosing)))),
        "kept": (choosing, pick(seen, min(KEPT, len(seen)))),
    }
    for name, (training, validation) in folders.items():
        write_photographs(dataset_path, output / name, training, validation)
    return {name: output / name for name in folders}


class Bench(NamedTuple):
    """What all runs share."""

    output: Path
    data: dict[str, Path]
    start: Path
    before: Scores
    images: int
    epochs: int

    def tune(self, seed: int, program: str, rate: float) -> Scores:
        folder = self.output / "tuned" / f"{program} {rate:g} {self.images} {self.epochs} {seed}"
        tune = self.tune_open_clip if program == "open_clip" else self.tune_ours
        scores = once(folder / "scores.json", lambda: tune(folder, seed, program, rate))
        for kind in ("pt", "pth", "safetensors"):
            for weights in folder.rglob(f"*.{kind}"):
                weights.unlink()
        return scores

    def tune_ours(self, folder: Path, seed: int, program: str, rate: float) -> Scores:
        run = train(
            folder, "--resume_training", self.start, "--dataset_path", self.data["new"],
            "--seed", seed, "--epochs", self.epochs, "--batch_size", BATCH, "--lr", rate, *TUNING,
            *(program.split() if program == DISTILL else ()),
        )  # fmt: skip
        _, *epochs = validation_recalls(run)
        test = mean_recall(json.loads((run / "test_metrics.json").read_text("utf-8")))
        lowest = min(epochs) - self.before["val"]
        return {"test": test, **scores_of(run_weights(run), self.data, ()), "lowest": lowest}

    def tune_open_clip(self, folder: Path, seed: int, _: str, rate: float) -> Scores:
        """One epoch of all captions has as many images as `epochs` of ours, with a caption each."""
        towers = folder / "towers"
        shutil.copytree(self.output / "towers_0", towers, dirs_exist_ok=True)
        model, _ = load(self.start, "cpu")
        entries = read_annotations(self.data["new"] / "en_train.json")
        tokens = model.tokenize([caption for _, captions in entries for caption in captions])
        description = read_json(towers / "open_clip_config.json")
        description["model_cfg"]["text_cfg"] |= {
            "hf_model_name": str(towers),
            "hf_tokenizer_name": str(towers),
            # As many tokens as the longest caption has: this saves time and changes no output.
            "context_length": int((tokens != model.tokenizer.padding).sum(dim=1).max()),
        }
        write_json(towers / "open_clip_config.json", description)
        save_safetensors(model.state_dict(), towers / "open_clip_model.safetensors", torch.float32)
        last = train_csv(
            self.data["new"], folder, "run", "--model", f"local-dir:{towers}", "--lr", rate,
            batch_size=BATCH, epochs=self.epochs // 5, seed=seed,
        )  # fmt: skip
        state = torch.load(last, weights_only=True)["state_dict"]
        save_safetensors(state, towers / "open_clip_model.safetensors", torch.float32)
        return scores_of(towers, self.data, ("test",))


def scores_of(weights: Path, data: dict[str, Path], splits: tuple[str, ...]) -> Scores:
    """Mean recall on these splits of the new photographs, and on the others as "kept"."""
    model, _ = load(weights, "cpu")

    def recall(name: str, split: str) -> float:
        dataset = Flickr8kDataset(data[name], split=split)
        dataset.prepare_for(model)
        return mean_recall(score(model, dataset))

    return {**{split: recall("new", split) for split in splits}, "kept": recall("kept", "val")}


if __name__ == "__main__":
    run_script(main)
