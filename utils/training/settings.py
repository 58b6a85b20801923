"""The arguments of train.py once it is known what they start from: filled in, and checked."""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from models.clip import CLIP
from models.clip_utils import check_name
from models.config import Config
from models.errors import InputError
from models.files import check_writable_folder, run_weights
from models.scripts import from_here
from models.weights.architecture import check_resolution
from models.weights.registry import CONFIGS
from utils.data.annotations import caption_file, missing_annotations
from utils.flickr8k_dataloader import Flickr8kDataset, check_batch_size
from utils.machine.processes import Processes
from utils.retrieval.tables import retained
from utils.training.layer_groups import trainable
from utils.training.resumed import read_resumed
from utils.training.retention import names_of

DEMO = {
    "dataset_path": from_here("flickr8k/demo"),
    "resume_training": "none",
    "model": "ViT-demo",
    "epochs": 28,
    "batch_size": 50,
}
CHINESE_DEMO = {"model": "cn-demo", "epochs": 30}
FROM_SCRATCH = {"lr": 5e-4}
FINE_TUNING = {"distill": 6.0, "wise_ft": [0.0, 0.25, 0.5, 0.75, 1.0], "max_forgetting": 2.0}
# Of fine-tuning, times the width of the wider tower: Adam's best rate falls as the width grows
# (Yang et al. 2021, "Tensor Programs V", table 3). Within a point of the best score at widths
# 128 to 384 and in other batches; with 200 images a lower rate is 1.2 points better
# (tests/benchmarks/learning_rate.py).
RATE_TIMES_WIDTH = 0.115
LORA_RATE = 3e-3
# What a run was started with stays in its records, however it goes on.
OF_THE_START = ("demo", "model", "resume_training")
# What the saved moments and the weights at the start belong to.
FIXED = ("input_shape", "activation", "optimizer_type", "layer_decay", "lock_image", "lock_text",
         "wise_ft", "lora", "distill")  # fmt: skip
# What decides which images and captions the rest of an epoch brings.
FIXED_IN_AN_EPOCH = ("batch_size", "captions_per_image", "no_augment", "seed")
# What may change without another result.
FREE = {"cache", "check_data", "dataset_path", "debug", "freq", "grad_checkpointing", "num_workers",
        "save_steps", "strict"}  # fmt: skip


def resolve_arguments(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint of the run that they continue, or None.

    What the command line leaves open comes from the run that is continued or from the demo's
    settings, then from the recipe for training from scratch or for fine-tuning. Raises `InputError`
    for arguments that contradict each other or the run, and for a checkpoint that is damaged.
    """
    args = parser.parse_args()
    resumed = None if args.demo else read_resumed(args.resume_training, parser)
    saved: dict[str, Any] = {}
    if args.demo:
        parser.set_defaults(**DEMO | (CHINESE_DEMO if args.language == ["cn"] else {}))
    elif resumed:
        saved = {k: v for k, v in resumed["arguments"].items() if k not in OF_THE_START}
        parser.set_defaults(**saved)
    args = parser.parse_args()
    if args.retention:
        args.retention = list(map(str, args.retention))  # a path, or the name of a set
    if resumed:
        _check_continued(args, saved, resumed)
        return args, resumed
    if args.optimizer_type == "sgd" and args.lr is None:
        raise InputError("--optimizer_type sgd: the default rate is Adam's, and SGD needs a far "
                         "higher one: give --lr, such as 1e-2")  # fmt: skip
    if args.max_forgetting is not None and not args.retention:
        raise InputError(
            "--max_forgetting is of the sets of --retention: add it, or leave both out"
        )
    try:
        check_writable_folder(args.log_dir)
    except InputError as error:
        raise InputError(f"--log_dir {error}") from None
    recipe = FROM_SCRATCH if args.resume_training == "none" else FINE_TUNING
    for name, value in (recipe | {"warmup_epochs": min(1.0, args.epochs / 10)}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args, None


def fine_tuning_rate(config: Config, lora: int | None) -> float:
    """The peak learning rate for a model of these sizes, rounded to two digits."""
    width = max(config.vision_width, config.transformer_width)
    return LORA_RATE if lora else float(f"{RATE_TIMES_WIDTH / width:.1e}")


def wants_demo_set(args: argparse.Namespace) -> bool:
    """Whether the demo's images are to be rendered: with --demo, where they are not yet, perhaps
    with another seed. Raises `InputError` for a folder with anything else in it."""
    folder = args.dataset_path
    if not args.demo or folder == DEMO["dataset_path"] or not folder.is_dir():
        return args.demo
    if any(folder.iterdir()) and not (folder / "images" / "train_0000.png").is_file():
        raise InputError(
            f"--demo trains on images of its own, and those in --dataset_path {folder} are others: "
            "to fine-tune a model on them, leave --demo out; to see the demo, leave --dataset_path "
            "out"
        )
    return not any(caption_file(folder, la, "train").exists() for la in args.language)


def as_saved(args: argparse.Namespace, resumed: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments as a run's arguments.json and checkpoint keep them."""
    given = vars(args) | {"dataset_path": args.dataset_path.resolve()}
    if args.retention:
        paths = map(Path, args.retention)
        given["retention"] = [str(path.resolve() if path.exists() else path) for path in paths]
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    if resumed:
        arguments |= {name: resumed["arguments"][name] for name in OF_THE_START}
    return arguments


def how_it_goes_on(args: argparse.Namespace, resumed: dict[str, Any]) -> Iterator[str]:
    """Lines on a run that goes on: in which epoch, and what is not as it was."""
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


def without_effect(args: argparse.Namespace, steps: int) -> Iterator[str]:
    """Lines on arguments that change nothing, or less than they seem to, in a run with so many
    steps an epoch."""
    if args.grad_cache and args.grad_cache >= args.batch_size:
        yield f"--grad_cache {args.grad_cache} has no effect: a batch has {args.batch_size} images"
    if args.patience and args.patience >= args.epochs:
        yield f"--patience {args.patience} has no effect: the run has {args.epochs} epochs"
    if args.save_steps and args.save_steps > steps:
        yield f"--save_steps {args.save_steps} has no effect: an epoch has {steps} steps"
    if args.ema and 1 / (1 - args.ema) > steps * args.epochs:
        yield (
            f"--ema {args.ema:g} averages over about {1 / (1 - args.ema):,.0f} steps, and this run "
            f"has {steps * args.epochs:,}: it stays near the start; lower --ema"
        )
    for tower in ("image", "text"):
        unlocked = getattr(args, f"lock_{tower}")
        if unlocked is not None and args.resume_training == "none":
            yield f"--lock_{tower} keeps random weights as they are: this run starts from scratch"
        if unlocked and args.lora:
            yield (f"--lock_{tower} {unlocked} with --lora: in these blocks only low-rank changes "
                   "learn, and nothing after them")  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `InputError` for arguments that contradict each other, or data that is not there."""
    if args.demo and args.resume_training != "none":
        raise InputError("--demo trains from scratch: leave --resume_training out")
    if args.resume_training == "none" and not args.model:
        raise InputError("--resume_training none trains from scratch and needs --model, such as "
                         "ViT-demo or ViT-B/32")  # fmt: skip
    if args.model and args.resume_training != "none":
        raise InputError("--model is for training from scratch: add --resume_training none, or "
                         "leave --model out, since weights bring their architecture")  # fmt: skip
    for name in ("retention", "wise_ft", "lora", "distill"):
        if getattr(args, name) and args.resume_training == "none":
            raise InputError(f"--{name} needs weights to start from: give --resume_training "
                             f"WEIGHTS, or leave --{name} out")  # fmt: skip
    if args.activation and args.resume_training == "none":
        raise InputError("--activation is that of weights: leave it out, since this run starts "
                         "from scratch")  # fmt: skip
    if args.lock_image == 0 and args.lock_text == 0:
        raise InputError("--lock_image and --lock_text together leave nothing to train: unlock "
                         "some blocks of one, such as --lock_text 2")  # fmt: skip
    if args.cache_features and 0 not in (args.lock_image, args.lock_text):
        raise InputError("--cache_features is for a tower that does not learn at all: add "
                         "--lock_image or --lock_text, without a number")  # fmt: skip
    if args.cache_features and args.lock_image == 0 and not args.no_augment:
        raise InputError("--cache_features with --lock_image needs the same images in every epoch: "
                         "add --no_augment")  # fmt: skip
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} should be less than --epochs "
                         f"{args.epochs}")  # fmt: skip
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
                " for data of yours: --dataset_path FOLDER, where one list of all images is split "
                f"by python {from_here('flickr8k/prepare.py')} --source FOLDER --output FOLDER"
                f"{' --language cn' if language == 'cn' else ''}; to see it work without any: "
                f"python {from_here('train.py')} --demo"
            )


def check_model(args: argparse.Namespace, device: torch.device, processes: Processes) -> None:
    """Raise `InputError` for arguments that a model cannot have whose name tells its sizes: its
    weights, which may take minutes to download, are not needed for that."""
    config = CONFIGS.get(args.model or args.resume_training)
    if config is None:
        return
    if args.input_shape is not None:
        check_resolution(config, args.input_shape)
    with torch.device("meta"):
        trainable(CLIP(config), args, device, processes)


def read_data(args: argparse.Namespace, processes: Processes) -> dict[str, Flickr8kDataset]:
    """The data set by split: "train", "val" and, where there are lists of it in all languages,
    "test". Raises `InputError` for lists that cannot be used, missing images, and a batch that is
    larger than the training split."""
    lists = [caption_file(args.dataset_path, language, "test") for language in args.language]
    splits = ["train", "val", "test"] if all(map(Path.is_file, lists)) else ["train", "val"]
    sets = {
        split: Flickr8kDataset(args.dataset_path, language=args.language, split=split)
        for split in splits
    }
    check_batch_size(args.batch_size, len(sets["train"]), processes)
    return sets


def check_same_data(args: argparse.Namespace, data: str, resumed: dict[str, Any] | None) -> None:
    """Raise `InputError` unless `data`, the fingerprint of the data set, is that of the run that
    goes on, if one does."""
    if resumed and data != resumed["data"]:
        run = Path(args.resume_training).parent.parent
        weights = run_weights(run) or run / "weights" / "last_epoch_weights.pth"
        raise InputError(
            f"--dataset_path {args.dataset_path}: its images or captions are not those of the run "
            "(or --language is not); to train on others, start a new run: "
            f"--resume_training {weights}"
        )


def _check_continued(
    args: argparse.Namespace, saved: dict[str, Any], resumed: dict[str, Any]
) -> None:
    """Raise `InputError` for arguments with which a run cannot go on."""
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
                "run from the run's weights/last_epoch_weights.pth"
            )
    epochs_done = len(resumed["rows"])
    if args.epochs < epochs_done:
        raise InputError(f"--epochs {args.epochs}: the run has {epochs_done} epochs already")
