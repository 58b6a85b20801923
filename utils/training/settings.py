"""The arguments of train.py, resolved and checked, and the data that they name."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from flickr8k.render_demo import render_demo
from models.clip import CLIP
from models.clip_utils import check_name
from models.config import Config
from models.errors import InputError
from models.files import check_writable_folder
from models.run_files import LAST, run_weights
from models.scripts import from_here
from models.weights.architecture import check_resolution
from models.weights.registry import CONFIGS
from utils.data.annotations import caption_file, missing_annotations
from utils.data.unlabelled import Unlabelled, find_unlabelled
from utils.flickr8k_dataloader import Flickr8kDataset, check_batch_size
from utils.machine.processes import ALONE, Processes
from utils.retrieval.tables import retained
from utils.training.layer_groups import freeze_and_adapt, whole_batch_norms
from utils.training.resumed import read_resumed
from utils.training.retention import Retention, names_of

DEMO = {
    "dataset_path": from_here("flickr8k/demo"),
    "resume_training": "none",
    "model": "ViT-demo",
    "epochs": 28,
    "batch_size": 50,
}
CHINESE_DEMO = {"model": "cn-demo", "epochs": 30}
FROM_SCRATCH = {"epochs": 20, "lr": 5e-4}
FINE_TUNING = {"epochs": 10, "patience": 3, "distill": 0.0,
               "wise_ft": [step / 10 for step in range(11)], "max_forgetting": 2.0}  # fmt: skip
DISTILL = 6.0  # with --distill_data
# Published fine-tuning of CLIP, see `PUBLISHED` in tests/utils/training/test_settings.py.
BASE_RATE = 1e-5  # for a width of 768 and 64 images a step
LARGEST_RATE = 5e-5
LORA_RATE = 2e-4  # CLIP-LoRA (Zanella & Ben Ayed 2024)
OF_THE_START = ("demo", "model", "resume_training")  # a run keeps its first values of these
# Saved moments and the starting weights depend on these.
FIXED = ("input_shape", "activation", "optimizer_type", "layer_decay", "lock_image", "lock_text",
         "wise_ft", "lora", "distill")  # fmt: skip
# The batches in the rest of an epoch depend on these.
FIXED_IN_AN_EPOCH = ("batch_size", "captions_per_image", "no_augment", "seed")
# These do not change the result.
FREE = {"cache", "dataset_path", "debug", "freq", "grad_checkpointing", "num_workers", "save_steps",
        "strict", "wandb"}  # fmt: skip


def resolve_arguments(
    parser: ArgumentParser, args: Namespace
) -> tuple[Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint of the run that they continue, or None.

    What the command line leaves open comes from the continued run or the demo, then from the recipe
    for training from scratch or for fine-tuning; the learning rate may come later, from the model
    (`resolve_rate`). Raises `InputError` for contradictions and for a damaged checkpoint.
    """
    resumed = None if args.demo else read_resumed(args.resume_training, parser)
    saved = (
        {k: v for k, v in resumed["arguments"].items() if k not in OF_THE_START} if resumed else {}
    )
    demo = DEMO | (CHINESE_DEMO if args.language == ["cn"] else {}) if args.demo else {}
    parser.set_defaults(**saved, **demo)
    args = parser.parse_args()
    if args.max_forgetting != saved.get("max_forgetting") and not args.retention:
        raise InputError("--max_forgetting is about the sets of --retention: add it, or leave both "
                         "out")  # fmt: skip
    if resumed:
        _check_continued(args, saved, resumed)
        return args, resumed
    if args.optimizer_type == "sgd" and args.lr is None:
        raise InputError("--optimizer_type sgd: the default rate is Adam's, and SGD needs a far "
                         "higher one: give --lr, such as 1e-2")  # fmt: skip
    try:
        check_writable_folder(args.log_dir)
    except InputError as error:
        raise InputError(f"--log_dir {error}") from None
    recipe = FROM_SCRATCH if args.resume_training == "none" else FINE_TUNING
    if args.distill_data and recipe is FINE_TUNING:
        recipe = recipe | {"distill": DISTILL}
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Namespace(**vars(args) | recipe | given), None


def _check_continued(args: Namespace, saved: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Raise `InputError` for arguments that a run cannot change."""
    measured = retained(resumed["start"] or {})
    if set(names_of(args.retention or [])) - measured.keys():
        raise InputError(
            "--retention: a run goes on with sets that it has measured before training, wherever "
            f"they lie: {', '.join(measured) or 'it has none'}; to change them, start a new run"
        )
    fixed = FIXED + FIXED_IN_AN_EPOCH if resumed["losses"] else FIXED
    for name in fixed:
        if getattr(args, name) != saved[name]:
            raise InputError(
                f"--{name}: a run goes on with its own, {saved[name]}; to change it, start a new "
                f"run from the run's {LAST}"
            )
    epochs_done = len(resumed["rows"])
    if args.epochs < epochs_done:
        raise InputError(f"--epochs {args.epochs}: the run has {epochs_done} epochs already")


def resolve_rate(args: Namespace, config: Config) -> Namespace:
    """The arguments with the peak learning rate; the default depends on the model's width."""
    rate = args.lr or (LORA_RATE if args.lora else fine_tuning_rate(config, args.batch_size))
    return Namespace(**vars(args) | {"lr": rate})


def fine_tuning_rate(config: Config, batch_size: int) -> float:
    """The default peak learning rate, rounded to two digits.

    Adam's best rate falls as the inverse of the widest tower's width (Yang et al. 2021, "Tensor
    Programs V", table 3), and rises as the root of the batch (Malladi et al. 2022).
    """
    width = max(config.last_width, config.transformer_width)
    rate = BASE_RATE * (768 / width) * math.sqrt(batch_size / 64)
    return min(float(f"{rate:.1e}"), LARGEST_RATE)


def as_saved(args: Namespace, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments as arguments.json and the checkpoint have them."""
    given = vars(args) | {"dataset_path": args.dataset_path.resolve()}
    for name in ("retention", "distill_data"):
        if given[name]:
            paths = map(Path, given[name])
            given[name] = [str(path.resolve() if path.exists() else path) for path in paths]
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    if resumed:
        arguments |= {name: resumed["arguments"][name] for name in OF_THE_START}
    return arguments


def how_it_goes_on(args: Namespace, resumed: dict[str, Any]) -> Iterator[str]:
    """Lines on a resumed run: the epoch, and the arguments that have changed."""
    epoch, steps = len(resumed["rows"]) + 1, len(resumed["losses"])
    if epoch <= args.epochs:
        within = f", of which {steps} steps are done" if steps else ""
        yield f"the run goes on with epoch {epoch} of {args.epochs}{within}"
    before, now = resumed["arguments"], as_saved(args, resumed)
    changed = [name for name in now if now[name] != before[name] and name != "log_dir"]
    if changed:
        words = "; ".join(f"--{name} {before[name]} -> {now[name]}" for name in changed)
        other = ", so that its result is not that of an uninterrupted run"
        yield f"changed: {words}{'' if FREE.issuperset(changed) else other}"
    if now["log_dir"] != before["log_dir"]:
        yield "--log_dir has no effect: a run goes on in its own folder"


def without_effect(args: Namespace, steps: int, processes: Processes = ALONE) -> Iterator[str]:
    """Lines on arguments that do little in a run with `steps` an epoch."""
    largest = -(-args.batch_size // processes.size)
    if args.grad_cache and args.grad_cache >= largest:
        yield f"--grad_cache {args.grad_cache} has no effect: a process has {largest} images a step"
    if args.ema and 1 / (1 - args.ema) > steps * args.epochs:
        yield (
            f"--ema {args.ema:g} averages over about {1 / (1 - args.ema):,.0f} steps, and this run "
            f"has {steps * args.epochs:,}: it stays near the start; lower --ema"
        )
    for tower in ("image", "text"):
        unlocked = getattr(args, f"lock_{tower}")
        if unlocked is not None and args.resume_training == "none":
            yield f"--lock_{tower} freezes random weights: this run starts from scratch"
        if unlocked and args.lora:
            yield (f"--lock_{tower} {unlocked} with --lora: in these blocks only low-rank changes "
                   "learn, and nothing after them")  # fmt: skip


def check_arguments(args: Namespace) -> None:
    """Raise `InputError` for contradictions and for missing data."""
    for contradiction in _contradictions(args):
        raise InputError(contradiction)
    if args.resume_training != "none":
        check_name(args.resume_training)
        if weights := run_weights(Path(args.resume_training)):
            raise InputError(
                f"{args.resume_training}: has no weights/checkpoint.pth to go on from; to start a "
                f"new run from its weights: --resume_training {weights}"
            )
    if args.cache:
        check_writable_folder(Path(args.cache).expanduser())
    for language, split in product(args.language, ("train", "val")):
        if missing := missing_annotations(caption_file(args.dataset_path, language, split)):
            raise InputError(
                f"{missing}. To get Flickr8k: python {from_here('flickr8k/prepare.py')} --download;"
                " for your own data: --dataset_path FOLDER, where one list of all images is split "
                f"by python {from_here('flickr8k/prepare.py')} --source FOLDER --output FOLDER"
                f"{' --language cn' if language == 'cn' else ''}; to see it work without any: "
                f"python {from_here('train.py')} --demo"
            )


def _contradictions(args: Namespace) -> Iterator[str]:
    from_scratch = args.resume_training == "none"
    if args.demo and not from_scratch:
        yield "--demo trains from scratch: leave --resume_training out"
    if from_scratch and not args.model:
        yield ("--resume_training none trains from scratch and needs --model, such as ViT-demo or "
               "ViT-B/32")  # fmt: skip
    if args.model and not from_scratch:
        yield ("--model is for training from scratch: add --resume_training none, or leave --model "
               "out, since weights bring their architecture")  # fmt: skip
    for name in ("retention", "wise_ft", "lora", "distill", "distill_data"):
        if from_scratch and getattr(args, name):
            yield (f"--{name} needs weights to start from: give --resume_training WEIGHTS, or "
                   f"leave --{name} out")  # fmt: skip
    if args.distill_data and args.distill == 0:
        yield "--distill_data is for distillation: leave --distill 0 out, or --distill_data"
    if from_scratch and args.activation:
        yield "--activation is that of weights: leave it out, since this run starts from scratch"
    if args.cache_features and 0 not in (args.lock_image, args.lock_text):
        yield ("--cache_features is for a frozen tower: add --lock_image or --lock_text, without a "
               "number")  # fmt: skip
    if args.cache_features and args.lock_image == 0 and not args.no_augment:
        yield ("--cache_features with --lock_image needs the same images in every epoch: add "
               "--no_augment")  # fmt: skip
    if args.warmup_epochs is not None and args.warmup_epochs >= args.epochs:
        yield (f"--warmup_epochs {args.warmup_epochs:g} should be less than --epochs "
               f"{args.epochs}")  # fmt: skip


def check_model(args: Namespace, device: torch.device, processes: Processes) -> None:
    """Raise `InputError` for arguments that a model of a known name cannot have: before its weights
    are downloaded."""
    config = CONFIGS.get(args.model or args.resume_training)
    if config is None:
        return
    if args.input_shape is not None:
        check_resolution(config, args.input_shape)
    with torch.device("meta"):
        model = CLIP(config)
        freeze_and_adapt(model, args.lock_image, args.lock_text, args.lora)
        if args.resume_training == "none":
            whole_batch_norms(model, device, processes, args.grad_cache)


def get_data(
    args: Namespace, device: torch.device, processes: Processes
) -> tuple[dict[str, Flickr8kDataset], Retention, Unlabelled]:
    """The data by split, that of --retention and that of --distill_data, after checks of the
    arguments. Renders the demo's images."""
    with processes.rank_0_first():  # rank 0 renders
        if args.demo and lacks_demo_set(args.dataset_path, args.language):
            render_demo(args.dataset_path)
    check_arguments(args)
    check_model(args, device, processes)
    unlabelled = find_unlabelled(args.distill_data or [])
    sets = read_data(args.dataset_path, args.language, args.batch_size, processes)
    return sets, Retention(args.retention or [], args.language, processes), unlabelled


def lacks_demo_set(folder: Path, languages: list[str]) -> bool:
    """Whether to render the demo's images into `folder`. Raises `InputError` for other files."""
    if folder == DEMO["dataset_path"] or not folder.is_dir():
        return True
    if any(folder.iterdir()) and not (folder / "images" / "train_0000.png").is_file():
        raise InputError(
            f"--demo trains on images of its own, and those in --dataset_path {folder} are others: "
            "to fine-tune a model on them, leave --demo out; to see the demo, leave --dataset_path "
            "out"
        )
    return not any(caption_file(folder, la, "train").exists() for la in languages)


def read_data(
    folder: Path, languages: list[str], batch_size: int, processes: Processes
) -> dict[str, Flickr8kDataset]:
    """The data set by split: "train", "val" and, if all languages have a list, "test". Raises
    `InputError` for unusable lists, missing images, and a batch larger than the training split."""
    lists = [caption_file(folder, language, "test") for language in languages]
    splits = ["train", "val", "test"] if all(map(Path.exists, lists)) else ["train", "val"]
    sets = {split: Flickr8kDataset(folder, language=languages, split=split) for split in splits}
    check_batch_size(batch_size, len(sets["train"]), processes)
    return sets


def check_same_data(data: str, resumed: dict[str, Any], checkpoint: str, folder: Path) -> None:
    """Raise `InputError` unless `data`, the fingerprint of the data in `folder`, is that of the
    `resumed` run."""
    if data != resumed["data"]:
        run = Path(checkpoint).parent.parent
        raise InputError(
            f"--dataset_path {folder}: its images or captions are not those of the run (or "
            "--language is not); to train on others, start a new run: --resume_training "
            f"{run_weights(run) or run / LAST}"
        )
