"""Does the default rate suit a model that knows much already? Rates around it, in small worlds.

    python tests/benchmarks/learning_rate.py --seeds 0

ViT-demo learns 8,000 varied images (`worlds.py`) and gets the logit scale of published models, 100.
It then learns shifts of that world, each by 930 steps of 64 images. Reported are the mean recall on
test images of the shift (gained) and of the world before (kept), both of the epoch that is best on
validation images of the shift, and how far the lowest epoch lies above the start on those. All
scores are kept in `--output`, and what is there is not computed again.
"""

from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from fine_tuning import RESEARCH, pretrain
from measure import print_table
from runs import (
    add_jobs,
    build_parser,
    jobs,
    mean_recall,
    over_seeds,
    score,
    scored,
    train,
    validation_recalls,
)
from tuned_towers import DISTILL, Scores, draw_rates
from worlds import SHIFTS, render_world

from models import load
from models.clip import MAX_LOGIT_SCALE
from models.host import run_script
from models.run_files import run_weights
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.plots import save_figure
from utils.runs.arguments import positive
from utils.runs.checkpoint import save_weights

PRETRAINING = "--epochs 10 --input_shape 32"  # in the world before
TUNING = ("--epochs", 10, "--batch_size", 64, "--wise_ft", 1, *RESEARCH)
DEFAULT = 4e-5  # of train.py, for this model and batch size
BEFORE, PLAIN = "before fine-tuning", "plain"


class Setting(NamedTuple):
    shift: str
    program: str
    rate: float = 0.0


Results = dict[Setting, list[Scores]]  # a seed after the other


def main() -> None:
    parser = build_parser(__doc__, output="logs/learning_rate")
    add_jobs(parser)
    add = parser.add_argument
    rates = [DEFAULT, 1.3e-5, 1.2e-4, 4e-6, 6e-4]
    add("--rates", type=positive, nargs="*", default=rates, help="(default: %(default)s)")
    add("--distill", type=positive, nargs="*", default=[DEFAULT], metavar="RATE",
        help="rates with --distill 6 (default: %(default)s)")  # fmt: skip
    add("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS), help="(default: all)")
    args = parser.parse_args()

    programs = [(BEFORE,), *product([PLAIN], args.rates), *product([DISTILL], args.distill)]
    settings = [Setting(shift, *program) for program, shift in product(programs, args.shifts)]
    results: Results = {setting: [] for setting in settings}
    with jobs(args.jobs) as pool:
        for seed in args.seeds:
            start = make_start(args.output, seed, args.shifts)
            for setting, scores in zip(
                settings, pool.map(partial(tune, start, seed), settings), strict=True
            ):
                results[setting].append(scores)
            print_results(results)
    plot(results, Path(__file__).with_suffix(".png"))


# Runs


def make_start(output: Path, seed: int, shifts: list[str]) -> Path:
    """The weights that all runs start from, in the folder of the worlds of this seed."""
    start = output / str(seed) / "start.pth"
    if not start.exists():
        model, _ = load(pretrain(output, seed, "foundation", PRETRAINING), "cpu")
        torch.nn.init.constant_(model.logit_scale, MAX_LOGIT_SCALE)
        save_weights(model, start)
    for shift in shifts:
        render_world(start.parent / shift, shift, seed)
    return start


def tune(start: Path, seed: int, setting: Setting) -> Scores:
    data = start.parent / setting.shift
    folder = start.parent / "runs" / setting.shift / f"{setting.program} {setting.rate:g}"

    def compute() -> Scores:
        if setting.program == BEFORE:
            return scores_of(start, data)
        run = train(
            folder,
            *("--resume_training", start, "--dataset_path", data, "--cache", "--seed", seed),
            *("--device", "cpu", "--lr", setting.rate, *TUNING),
            *(DISTILL.split() if setting.program == DISTILL else ()),
        )
        first, *epochs = validation_recalls(run)
        return {**scores_of(run_weights(run), data), "lowest": min(epochs) - first}

    return scored(folder, compute)


def scores_of(weights: Path, data: Path) -> Scores:
    """Mean recall on the test images of a shift, and of the world before as "kept"."""
    model, _ = load(weights, "cpu")
    folders = {"test": data, "kept": data.parent / "foundation"}
    return {
        name: mean_recall(score(model, Flickr8kDataset(folder, split="test", model=model)))
        for name, folder in folders.items()
    }


# Results


def print_results(results: Results) -> None:
    rows = []
    for shift, program in product(shifts_of(results), (BEFORE, PLAIN, DISTILL)):
        for rate, seeds in by_rate(results, shift, program).items():
            columns = [over_seeds(one[what] for one in seeds) for what in seeds[0]]
            name = f"{program}, {rate:g}" if rate else program
            rows.append([shift, name, *columns, *[""] * (3 - len(columns))])
    seeds = len(next(iter(results.values())))
    print(f"\nmean recall, percent, mean ± standard deviation; seeds: {seeds}\n")
    print_table(["shift", "settings", "gained", "kept", "lowest epoch, above the start"], rows)


def plot(results: Results, file: Path) -> None:
    """What is gained against what is kept, a panel a shift and a line a program."""
    from matplotlib.figure import Figure

    shifts = shifts_of(results)
    figure = Figure(figsize=(4.6 * len(shifts), 4.6), layout="constrained")
    for panel, shift in zip(figure.subplots(1, len(shifts), squeeze=False)[0], shifts, strict=True):
        (before,) = by_rate(results, shift, BEFORE).values()
        place = [mean(one[what] for one in before) for what in ("kept", "test")]
        panel.plot(*place, "k*", markersize=12, label=BEFORE)
        for program in (PLAIN, DISTILL):
            if seeds := by_rate(results, shift, program):
                draw_rates(panel, program, seeds)
        panel.set(title=shift, xlabel="kept: mean recall in the world before, percent",
                  ylabel="gained: mean recall in the new world, percent")  # fmt: skip
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, file)


def shifts_of(results: Results) -> list[str]:
    return list(dict.fromkeys(setting.shift for setting in results))


def by_rate(results: Results, shift: str, program: str) -> dict[float, list[Scores]]:
    """The results of a program in a shift, by rising rate."""
    return {
        one.rate: seeds for one, seeds in sorted(results.items()) if one[:2] == (shift, program)
    }


if __name__ == "__main__":
    run_script(main)
