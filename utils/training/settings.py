"""The arguments of train.py, resolved and checked, and the data that they name."""

import math
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from flickr8k.render_demo import render_demo
from models.clip_utils import check_name
from models.config import Config
from models.errors import InputError
from models.files import check_writable_folder
from models.run_files import LAST
from models.scripts import from_here
from utils.data.annotations import caption_file, missing_annotations
from utils.data.streamed import Stream
from utils.data.unlabelled import Unlabelled, find_unlabelled
from utils.flickr8k_dataloader import Flickr8kDataset, check_batch_size
from utils.machine.processes import ALONE, Processes
from utils.retrieval.tables import retained
from utils.training.resumed import read_resumed
from utils.training.retention import Retention, names_of

DEMO = {"dataset_path": from_here("flickr8k/demo"), "resume_training": "none",
        "model": "ViT-demo", "epochs": 28, "batch_size": 50}  # fmt: skip
CHINESE_DEMO = {"model": "cn-demo", "epochs": 30}
FROM_SCRATCH = {"epochs": 20, "lr": 5e-4}
FINE_TUNING = {"epochs": 10, "patience": 3, "distill": 0.0,
               "wise_ft": [step / 10 for step in range(11)], "max_forgetting": 2.0}  # fmt: skip
DISTILL = 6.0  # with --distill_data
# Published fine-tuning of CLIP, see `PUBLISHED` in tests/utils/training/test_settings.py.
BASE_RATE = 1e-5  # for a width of 768 and 64 images a step
LARGEST_RATE = 5e-5
LORA_RATE = 2e-4  # CLIP-LoRA (Zanella & Ben Ayed 2024)
OF_THE_START = ("demo", "log_dir", "model", "resume_training")  # a run keeps its first values
# Saved moments and the starting weights depend on these.
FIXED = ("input_shape", "activation", "optimizer_type", "layer_decay", "lock_image", "lock_text",
         "wise_ft", "lora", "distill")  # fmt: skip
# The batches in the rest of an epoch depend on these.
FIXED_IN_AN_EPOCH = ("batch_size", "captions_per_image", "no_augment", "seed")


def resolve_arguments(
    given: Namespace, defaults: Namespace
) -> tuple[Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint of the run that they continue, or None. What the command
    line leaves open, None in `given`, comes from the continued run or the demo, then from the
    recipe for training from scratch or for fine-tuning, then from the `defaults`. Raises
    `InputError` for contradictions and for a damaged checkpoint."""
    typed = {name: value for name, value in vars(given).items() if value is not None}
    demo = DEMO if given.demo else {}
    if demo and given.language == ["cn"]:
        demo = DEMO | CHINESE_DEMO
    args = vars(defaults) | demo | typed
    resumed = None if given.demo else read_resumed(args["resume_training"], set(args))
    if resumed:
        saved = {k: v for k, v in resumed["arguments"].items() if k not in OF_THE_START}
        args |= saved | typed
        args["dataset_path"] = Path(args["dataset_path"])
        _check_continued(args, resumed)
    else:
        is_from_scratch = args["resume_training"] == "none"
        recipe = FROM_SCRATCH if is_from_scratch else FINE_TUNING
        if given.distill_data and not is_from_scratch:
            recipe = recipe | {"distill": DISTILL}
        args |= {name: value for name, value in recipe.items() if args[name] is None}
        check_writable_folder(args["log_dir"])
        if args["optimizer_type"] == "sgd" and given.lr is None:
            raise InputError("--optimizer_type sgd needs a higher rate: give --lr, such as 1e-2")
    if given.max_forgetting is not None and not args["retention"]:
        raise InputError("--max_forgetting is for --retention: add that, or leave both out")
    for contradiction in _contradictions(Namespace(**args)):
        raise InputError(contradiction)
    return Namespace(**args), resumed


def _check_continued(args: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Raise `InputError` for arguments that a run cannot change."""
    own = retained(resumed["start"] or {})
    if set(names_of(args["retention"] or [])) - own.keys():
        raise InputError(
            "--retention: a run goes on with sets that it has measured before training, "
            f"{', '.join(own) or 'none here'}; to change them, start a new run"
        )
    for name in FIXED + FIXED_IN_AN_EPOCH if resumed["losses"] else FIXED:
        if args[name] != resumed["arguments"][name]:
            raise InputError(
                f"--{name}: a run goes on with its own, {resumed['arguments'][name]}; to change "
                f"it, start a new run from the run's {LAST}"
            )
    if args["epochs"] < len(resumed["rows"]):
        raise InputError(f"--epochs {args['epochs']}: the run has {len(resumed['rows'])} epochs "
                         "already")  # fmt: skip


def default_rate(config: Config, batch_size: int, lora: int | None) -> float:
    """The default peak learning rate of fine-tuning: falls as the inverse of the widest tower's
    width (Yang et al. 2021, "Tensor Programs V", table 3), rises as the root of the batch (Malladi
    et al. 2022)."""
    if lora:
        return LORA_RATE
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
        if args.stream and steps:
            yield ("--stream: after as many samples, though not bit for bit where --num_workers or "
                   "the processes have changed, or a sample was broken")  # fmt: skip
    before, now = resumed["arguments"], as_saved(args, resumed)
    changed = [f"--{n} {before[n]} -> {now[n]}" for n in now if now[n] != before[n]]
    if changed:
        yield f"changed: {'; '.join(changed)}"


def without_effect(args: Namespace, steps: int, processes: Processes = ALONE) -> Iterator[str]:
    """Lines on arguments that do little in a run of so many steps."""
    largest, averaged = -(-args.batch_size // processes.size), 1 / (1 - (args.ema or 0))
    if args.grad_cache and args.grad_cache >= largest:
        yield f"--grad_cache {args.grad_cache} has no effect: a process has {largest} images a step"
    if averaged > steps:
        yield (f"--ema {args.ema:g} averages over about {averaged:,.0f} steps, and this run has "
               f"{steps:,}: lower it")  # fmt: skip
    if args.lora and (args.lock_image or args.lock_text):
        yield "of the blocks that are not locked, --lora trains low-rank changes only"


def check_arguments(args: Namespace) -> None:
    """Raise `InputError` for an unknown model and for missing data."""
    if args.resume_training != "none":
        check_name(args.resume_training)
    if args.cache:
        check_writable_folder(Path(args.cache).expanduser())
    for language, split in product(args.language, ("val",) if args.stream else ("train", "val")):
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
        yield "--resume_training none needs --model, such as ViT-demo or ViT-B/32"
    if args.model and not from_scratch:
        yield "--model trains from scratch: add --resume_training none, or leave --model out"
    for name in ("retention", "wise_ft", "lora", "distill", "distill_data"):
        if from_scratch and getattr(args, name):
            yield (f"--{name} needs weights to start from: give --resume_training WEIGHTS, or "
                   f"leave --{name} out")  # fmt: skip
    if args.cache_features and 0 not in (args.lock_image, args.lock_text):
        yield "--cache_features needs a frozen tower: --lock_image or --lock_text without a number"
    if args.cache_features and args.lock_image == 0 and not args.no_augment:
        yield "--cache_features of images needs the same ones in every epoch: add --no_augment"
    if args.stream_samples and not args.stream:
        yield "--stream_samples counts what --stream names: add it, or leave both out"
    for name in ("cache", "cache_features", "strict"):
        if args.stream and getattr(args, name) not in (None, False):
            yield f"--{name} needs all images beforehand, not a --stream: leave one of them out"


def get_data(
    args: Namespace, processes: Processes
) -> tuple[dict[str, Flickr8kDataset | Stream], Retention, Unlabelled]:
    """The data by split, that of --retention and that of --distill_data; renders the demo's."""
    with processes.rank_0_first():  # rank 0 renders
        if args.demo:
            render_demo(args.dataset_path)
    check_arguments(args)
    unlabelled = find_unlabelled(args.distill_data or [])
    stream = Stream(args.stream, args.stream_samples) if args.stream else None
    sets = processes.shared(
        lambda: read_data(args.dataset_path, args.language, args.batch_size, processes, stream)
    )
    return sets, Retention(args.retention or [], args.language, processes), unlabelled


def read_data(
    folder: Path,
    languages: list[str],
    batch_size: int,
    processes: Processes,
    stream: Stream | None = None,
) -> dict[str, Flickr8kDataset | Stream]:
    """The data set by split: "train" (or a `stream`), "val" and, if all languages have a list,
    "test". Raises `InputError` for unusable data, and a batch larger than the training split."""
    lists = [caption_file(folder, language, "test") for language in languages]
    splits = ["train", "val", "test"] if all(map(Path.exists, lists)) else ["train", "val"]
    sets = {} if stream is None else {"train": stream}
    for split in splits[len(sets) :]:
        sets[split] = Flickr8kDataset(folder, language=languages, split=split)
    check_batch_size(batch_size, len(sets["train"]), processes)
    return sets
