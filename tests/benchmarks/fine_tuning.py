"""What does fine-tuning gain, and what is forgotten for it? Many settings in two small worlds.

    pip install 'open_clip_torch[training]'
    python tests/benchmarks/fine_tuning.py

For each seed ViT-demo learns world A (`worlds.py`) with `train.py --demo`, and is then fine-tuned
on 600 images of B, and on 600 of B2, by every setting in `SETTINGS`, by `train.py` or by
open_clip's program. What it gains is its mean recall on the new world, what it keeps is that on A.
The weights are those of the best epoch, and mixtures of them with the weights at the start
(WiSE-FT); of open_clip those of the last epoch.

A family of settings is a line from keeping to gaining. The point on it is chosen on validation
images, one setting for both worlds; the scores are those of test images, which have no say in it.
All scores are kept in `--output`, and what is there is not computed again.
"""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from measure import print_table
from open_clip_training import train_open_clip
from runs import (
    add_jobs,
    build_parser,
    jobs,
    mean_recall,
    once,
    over_seeds,
    score_in_parts,
    scored,
    train,
)
from worlds import render_world

from models import load
from models.clip import CLIP
from models.host import run_script
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.retrieval.plots import save_figure
from utils.runs.arguments import path
from utils.runs.checkpoint import write_json
from utils.training.wise_ft import mix_into

WORLDS = {
    "B": "B: other colours, blurred, noisy",
    "B2": "B2: other shapes, other words",
}
ALPHAS = (0.25, 0.5, 0.75, 1.0)
RESEARCH = ("--patience", 0, "--no_guard")  # every setting has its time, however it ends
TEN = "--epochs 10"
ALONE = f"{TEN} --layer_decay 0.7"  # the settings of before `--distill`
SETTINGS = {  # of train.py; "open_clip": of its program
    "default": [""],
    "--distill": [f"--epochs 20 --distill {weight}" for weight in (2, 6, 12)],
    "--distill, 10 epochs": [f"{TEN} --distill {weight}" for weight in (2, 6, 12)],
    "training alone": [f"{ALONE} --lr {lr}" for lr in ("3e-5", "1e-4", "3e-4", "1e-3")],
    "open_clip": [f"--lr {lr}" for lr in ("3e-5", "1e-4", "3e-4", "1e-3")],
    "--lora 8": [f"{TEN} --distill 6 --lora 8"],
    "--ema 0.95": [f"{TEN} --distill 6 --ema 0.95"],
}
FLOORS = (90, 80)  # of what is kept of A
GALLERY = 200  # images
OPEN_CLIP_EPOCHS = 2  # of a row a caption: as many images as ten epochs of ours


class Point(NamedTuple):
    """A setting, and the weights at `alpha` on the way from the start to its end: for each world
    and each seed what is gained there, and what is kept of A, by split."""

    family: str
    setting: str
    alpha: float
    scores: dict[str, list[dict]]

    def of(self, world: str, what: str, split: str) -> list[float]:
        return [seed[what][split] for seed in self.scores[world]]

    def overall(self, what: str) -> float:
        """Over worlds and seeds, on the validation images."""
        return mean(mean(self.of(world, what, "val")) for world in WORLDS)


def main() -> None:
    parser = build_parser(__doc__, output="logs/fine_tuning")
    add_jobs(parser)
    parser.add_argument("--plot", type=path, default=Path(__file__).with_suffix(".png"),
                        metavar="FILE", help="(default: %(default)s)")  # fmt: skip
    args = parser.parse_args()

    with jobs(args.jobs) as pool:
        before = list(pool.map(lambda seed: scores_before(args.output, seed), args.seeds))
        wanted = list(product(all_settings(), args.seeds, WORLDS))
        scores = list(pool.map(lambda each: fine_tune(args.output, *each), wanted))
    points = collect(dict(zip(wanted, scores, strict=True)), args.seeds)
    write_json(args.output / "fine_tuning.json", [point._asdict() for point in points])
    print_points(points, before)
    print_choices(points)
    plot(points, args.plot)
    print(f"every seed: {args.output / 'fine_tuning.json'}, plot: {args.plot}")


def all_settings() -> list[tuple[str, str]]:
    return [(family, setting) for family, settings in SETTINGS.items() for setting in settings]


# Runs


def pretrain(output: Path, seed: int, world: str = "A", arguments: str = "--epochs 28") -> Path:
    """The weights of a model that has learned this world, with these arguments of train.py."""
    data = render_world(output / str(seed) / world, world, seed)
    run = train(
        output / str(seed) / "pretrained",
        *("--resume_training", "none", "--model", "ViT-demo", "--batch_size", 50),
        *("--dataset_path", data, "--seed", seed, "--device", "cpu", "--cache", *arguments.split()),
    )
    return run / "weights" / "last_epoch_weights.pth"


def scores_before(output: Path, seed: int) -> dict[str, dict[str, float]]:
    """Scores of the pretrained model on all worlds, which are rendered."""
    weights = pretrain(output, seed)
    data = {name: render_world(output / str(seed) / name, name, seed) for name in ("A", *WORLDS)}
    file = output / str(seed) / "before.json"
    return once(file, lambda: scores_of(load(weights, "cpu")[0], data))


def fine_tune(output: Path, which: tuple[str, str], seed: int, world: str) -> dict[str, dict]:
    """Scores by alpha (as text, since they are kept in a file), by "gained" and "kept"."""
    (family, setting), start = which, pretrain(output, seed)
    data = {name: output / str(seed) / name for name in (world, "A")}
    folder = output / str(seed) / f"{world} {family}" / (setting or "default")

    def compute() -> dict[str, dict]:
        if family == "open_clip":
            weights = train_open_clip(
                data[world], folder, "run", *setting.split(), "--wd", 0.1,
                batch_size=64, epochs=OPEN_CLIP_EPOCHS, seed=seed, start=start,
            )  # fmt: skip
            return {"1.0": scores_of(load(weights, "cpu", activation="quick_gelu")[0], data)}
        run = train(
            folder,
            *("--resume_training", start, "--dataset_path", data[world], "--seed", seed),
            *("--device", "cpu", "--cache", *setting.split(), *RESEARCH),
        )
        model, _ = load(run / "weights" / "best_epoch_weights.pth", "cpu")
        before = load(start, "cpu")[0].state_dict()
        after = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        scores = {}
        for alpha in ALPHAS:
            mix_into(model, before, after, alpha)
            scores[str(alpha)] = scores_of(model, data)
        return scores

    by_alpha = scored(folder, compute)
    return {
        alpha: {"gained": scores[world], "kept": scores["A"]} for alpha, scores in by_alpha.items()
    }


def scores_of(model: CLIP, data: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Mean recall on each data set, validation and test, among `GALLERY` images at a time: the more
    there are, the lower it is."""

    def recall(folder: Path, split: str) -> float:
        images = Flickr8kDataset(folder, split=split, model=model)
        images.cache()
        return mean(mean_recall(metrics) for metrics in score_in_parts(model, images, GALLERY))

    return {
        name: {split: recall(folder, split) for split in ("val", "test")}
        for name, folder in data.items()
    }


# Results


def collect(scores: dict[tuple, dict], seeds: Iterable[int]) -> list[Point]:
    points = []
    for which in all_settings():
        first = scores[which, next(iter(seeds)), "B"]
        for alpha in first:
            of_worlds = {
                world: [scores[which, seed, world][alpha] for seed in seeds] for world in WORLDS
            }
            points.append(Point(*which, float(alpha), of_worlds))
    return points


def families(points: list[Point]) -> dict[str, list[Point]]:
    """The points of every family; training alone with mixtures is one of its own."""
    found = {
        family: [p for p in points if p.family == family and p.alpha == 1] for family in SETTINGS
    }
    found["training alone, mixed"] = [p for p in points if p.family == "training alone"]
    found["all of ours, mixed"] = [p for p in points if p.family != "open_clip"]
    return found


def choose(points: list[Point], floor: float) -> Point | None:
    """The point that gains most of those that keep `floor` in both worlds, on validation images."""
    keeping = [
        point
        for point in points
        if all(mean(point.of(world, "kept", "val")) >= floor for world in WORLDS)
    ]
    return max(keeping, key=lambda point: point.overall("gained"), default=None)


def columns(point: Point) -> list[str]:
    return [
        over_seeds(point.of(world, what, "test"))
        for world, what in product(WORLDS, ("gained", "kept"))
    ]


HEADER = [f"{world} {what}" for world, what in product(WORLDS, ("gained", "A kept"))]


def print_points(points: list[Point], before: list[dict]) -> None:
    start = [
        over_seeds(seed[name]["test"] for seed in before)
        for name in (name for world in WORLDS for name in (world, "A"))
    ]
    print(f"\ntest images, mean recall, mean ± standard deviation over {len(before)} seeds\n")
    rows = [["before fine-tuning", "", *start]]
    rows += [[p.family, f"`{p.setting}`" if p.setting else "default", *columns(p)]
             for p in points if p.alpha == 1]  # fmt: skip
    print_table(["", "settings", *HEADER], rows)


def print_choices(points: list[Point]) -> None:
    """For each floor, the setting of each family that validation chooses."""
    for floor in FLOORS:
        rows = []
        for family, members in families(points).items():
            if point := choose(members, floor):
                setting = f"`{point.setting}`" if point.setting else "default"
                mixed = f", alpha {point.alpha:g}" if point.alpha < 1 else ""
                rows.append([family, setting + mixed, *columns(point)])
            else:
                rows.append([family, "none", *[""] * len(HEADER)])
        print(f"\nchosen on validation to keep {floor} of A; test images\n")
        print_table(["", "settings", *HEADER], rows)


def plot(points: list[Point], file: Path) -> None:
    """What is gained against what is kept, a panel a world and a line a family, setting by setting,
    with the standard deviation over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for panel, (world, title) in zip(figure.subplots(1, 2), WORLDS.items(), strict=True):
        for number, (family, members) in enumerate(families(points).items()):
            if family == "all of ours, mixed":
                continue
            if family == "training alone, mixed":
                members = [point for point in members if point.alpha == 0.5]
            kept, gained = (
                [point.of(world, what, "test") for point in members] for what in ("kept", "gained")
            )
            panel.errorbar(
                [mean(values) for values in kept], [mean(values) for values in gained],
                xerr=[spread(values) for values in kept],
                yerr=[spread(values) for values in gained],
                fmt="o-" if len(members) > 1 else "D", color=f"C{number}", label=family,
                markersize=4, linewidth=1.2, elinewidth=0.7,
            )  # fmt: skip
        panel.set(title=title, xlabel="kept: mean recall on A, percent",
                  ylabel="gained: mean recall, percent")  # fmt: skip
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    save_figure(figure, file)


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    run_script(main)
