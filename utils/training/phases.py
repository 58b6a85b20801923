"""The phases of train.py around its loop: model, batches, run, state; and the end."""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.clip import CLIP
from models.clip_utils import create_model, load
from models.device import moved
from models.errors import InputError
from models.run_files import ARGUMENTS, BEST, LAST, START, TEST_METRICS
from utils.data.image_files import check_splits
from utils.data.streamed import Stream
from utils.data.unlabelled import Unlabelled
from utils.flickr8k_dataloader import Flickr8kDataset, StreamLoader, TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.machine.pyzjr_parts import SeedEvery, get_optimizer
from utils.retrieval.bootstrap import Comparison
from utils.retrieval.evaluation import Evaluator
from utils.retrieval.plots import plot_losses, plot_scores
from utils.retrieval.report import write_report
from utils.retrieval.scores import score_features
from utils.retrieval.tables import format_change, format_table
from utils.runs.checkpoint import save_weights, write_json
from utils.runs.commands import what_to_try
from utils.runs.folder import Run, new_run_folder, reopen_run_folder
from utils.runs.labels import labels_to_try
from utils.runs.records import Log, Losses
from utils.runs.wandb_run import Wandb
from utils.training.distillation import distill_from_start
from utils.training.layer_groups import freeze_and_adapt, whole_batch_norms
from utils.training.optimizer import parameter_groups
from utils.training.retention import Retention
from utils.training.settings import as_saved, how_it_goes_on, without_effect
from utils.training.state import State
from utils.training.wise_ft import Mixtures, best_row, weights_of

CAPTIONED = 200  # images whose captions suggest labels
Splits = dict[str, Flickr8kDataset | Stream]  # the latter in training alone
Checkpoint = dict[str, Any]


def get_model(
    args: Namespace, resumed: Checkpoint | None, device: torch.device, processes: Processes
) -> CLIP:
    """The model to train, on the CPU: from a checkpoint, from weights, or random. Sets the seed."""
    SeedEvery(args.seed)
    with processes.rank_0_first():  # rank 0 downloads
        if resumed:
            model = resumed["model"]
        elif args.resume_training == "none":
            model = create_model(args.model, args.input_shape)
        else:
            model, _ = load(args.resume_training, "cpu", input_shape=args.input_shape,
                            activation=args.activation)  # fmt: skip
    freeze_and_adapt(model, args.lock_image, args.lock_text, args.lora)
    if _is_from_scratch(args, resumed):
        model = whole_batch_norms(model, device, processes, args.grad_cache)
    return model


def _is_from_scratch(args: Namespace, resumed: Checkpoint | None) -> bool:
    return resumed["start"] is None if resumed else args.resume_training == "none"


def get_loader(
    args: Namespace,
    sets: Splits,
    model: CLIP,
    device: torch.device,
    processes: Processes,
    unlabelled: Unlabelled,
) -> TrainLoader:
    """The batches to train on. Prepares all splits for the model."""
    by_default = 0 if device.type == "cpu" else 4
    num_workers = by_default if args.num_workers is None else args.num_workers
    for dataset in sets.values():
        dataset.prepare_for(model)
    if args.cache is not None:
        with processes.rank_0_first():  # rank 0 decodes
            for dataset in sets.values():
                dataset.cache(args.cache or None, device, num_workers)
    if processes.is_rank_0:
        check_splits(sets, num_workers, train_too=args.strict)
    loader = StreamLoader if args.stream else TrainLoader
    return loader(
        sets["train"], args.batch_size, device, args.seed, num_workers, augment=not args.no_augment,
        captions_per_image=args.captions_per_image, strict=args.strict, processes=processes,
        alter=bool(args.distill), unlabelled=unlabelled)  # fmt: skip


def open_run(
    args: Namespace, resumed: Checkpoint | None, model: CLIP, loader: TrainLoader, sets: Splits
) -> Run:
    """The run's folder with its arguments, log and losses. `InputError` for data of another run."""
    data = sets["train"].fingerprint() + sets["val"].fingerprint()
    run = Run(loader.processes, as_saved(args, resumed), data)
    if resumed and data != resumed["data"]:
        raise InputError(
            f"--dataset_path {args.dataset_path}: its images or captions are not those of the run "
            "(or --language or --stream is not); to train on others, start a new run: "
            f"--resume_training {Path(args.resume_training).with_name(Path(BEST).name)}"
        )
    if not loader.processes.is_rank_0:
        return run
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    if resumed:
        run.folder = reopen_run_folder(args.resume_training, resumed)
    else:
        run.folder = new_run_folder(args.log_dir, started)
    write_json(run.folder / ARGUMENTS, run.arguments)
    sys.stdout = Log(run.folder / f"console_{started}.log", args)
    print(f"arguments: {' '.join(sys.argv[1:]) or 'none'} (learning rate {args.lr:g}; all: "
          f"{ARGUMENTS})")  # fmt: skip
    on = how_it_goes_on(args, resumed) if resumed else ()
    for line in (*on, *without_effect(args, len(loader) * args.epochs, loader.processes)):
        print(line)
    wandb = Wandb(run.folder, run.arguments) if args.wandb else None
    rows = resumed["rows"] if resumed else []
    run.loss_history = Losses(run.folder, rows, plot_losses, wandb)
    if not resumed and args.resume_training != "none":
        save_weights(model, run.folder / START)
    return run


def get_state(
    args: Namespace, resumed: Checkpoint | None, model: CLIP, loader: TrainLoader, run: Run
) -> State:
    """The model on its device, its optimizer, and the checkpoint's state."""
    device = loader.device
    moved(model, device)
    optimizer = get_optimizer(model, args.optimizer_type, args.lr)
    groups = parameter_groups(
        model, args.momentum, args.weight_decay, args.layer_decay, _is_from_scratch(args, resumed)
    )
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    distillation = None
    if args.distill:
        distillation = distill_from_start(
            model, run.start_weights(), args.distill, loader.dataset.tokens
        )
    state = State(model, optimizer, Precision(device, args.use_amp), args.ema, distillation)
    if resumed:
        state.restore(resumed)
        if args.no_guard:
            state.baseline, state.lost = {}, []
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    if args.compile:
        model.compile_towers()
        if distillation:
            distillation.start.compile_towers()
    return state


def finish(
    args: Namespace,
    run: Run,
    sets: Splits,
    state: State,
    loader: TrainLoader,
    val: Flickr8kDataset,
    retention: Retention,
    cached: Mapping[str, Tensor],
) -> None:
    """Choose the weights that count on the validation images `val` of the epochs, with `cached`
    features, and score them on all validation images and on the test split."""
    folder, evaluator = run.folder, Evaluator(loader, state.precision)  # of rank 0 alone
    chosen = folder / BEST
    kept = state.epochs[state.best_epoch - 1]
    print(f"\nbest epoch: {kept['epoch']}, mean recall {kept['mean_recall']:.2f}")
    run.loss_history.close()
    state.release()
    model, _ = load(chosen, state.precision.device)
    if args.wise_ft:
        alphas = args.wise_ft if args.no_guard else sorted({0.0, *args.wise_ft})
        mixtures = Mixtures(model, weights_of(folder / START), folder, args.max_forgetting)
        for epoch, file in {state.best_epoch: BEST, len(state.epochs): LAST}.items():
            for _ in mixtures.each(epoch, weights_of(folder / file), alphas):
                found = evaluator.score(model, val, cached=cached)
                mixtures.add(*found, retention.compare(model, state.start))
        chosen = mixtures.choose()
        kept = best_row(mixtures.rows, args.max_forgetting)
    whole = sets["val"]
    features = evaluator.encode(model, whole)
    scores = score_features(*features, whole.img_to_txt, whole.txt_to_img, range(1, 11))
    print(f"{chosen.name}:\n{format_table(scores, 'val')}")
    if state.start and val is whole:
        print(format_change(state.start, kept))
    plot_scores(scores, folder / "R_mAP.png")
    if "test" in sets:
        score_on_test(evaluator, model, sets["test"], chosen)
    first = (whole.own_captions[image] for image in range(min(len(whole), CAPTIONED)))
    labels = labels_to_try([[whole.text[caption] for caption in own] for own in first])
    print(f"\n{what_to_try(whole.image[0], chosen, labels)}")
    report = folder / "report.html"
    write_report(report, chosen, whole, features, scores)
    print(f"scores, curves, answers to every query, in a browser\n  {report.absolute().as_uri()}")


def score_on_test(
    evaluator: Evaluator, model: CLIP, test_set: Flickr8kDataset, chosen: Path
) -> None:
    """Score a run's `chosen` weights, which `model` has, and the starting ones on the test split,
    by both protocols if they differ; print the scores, and write them to test_metrics.json."""
    file, start = chosen.parents[1] / TEST_METRICS, chosen.with_name(Path(START).name)
    features = {"after": evaluator.encode(model, test_set)}
    if start.exists():
        model.load_state_dict(weights_of(start))
        features = {"before": evaluator.encode(model, test_set), **features}
    found = Comparison(features, test_set)
    print(f"\n{chosen.name} on the test images, which had no say in choosing it:\n"
          f"{format_table(found.scores['after'], 'test')}")  # fmt: skip
    content = found.for_json()
    print("with 95% bootstrap intervals", *found.lines(), sep="\n")
    if test_set.count_shared_captions():
        plain = Comparison(features, test_set.plain())
        print("the same where a caption is a positive of its own image alone",
              *plain.lines(), sep="\n")  # fmt: skip
        content["plain_protocol"] = plain.for_json()
    write_json(file, content)
