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
from models.run_files import ARGUMENTS, START, tuned_weights
from utils.data.image_files import check_splits
from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
from utils.machine.precision import Precision
from utils.machine.processes import Processes
from utils.machine.pyzjr_parts import SeedEvery, get_optimizer, show_config
from utils.retrieval.evaluation import Evaluator
from utils.runs.checkpoint import write_json
from utils.runs.commands import what_to_try
from utils.runs.folder import Run, new_run_folder, reopen_run_folder
from utils.runs.records import Log, Losses
from utils.training.distillation import distill_from_start
from utils.training.layer_groups import freeze_and_adapt, whole_batch_norms
from utils.training.optimizer import parameter_groups, replace_groups
from utils.training.progress import comment_on_epochs, report_chosen, report_test
from utils.training.retention import Retention
from utils.training.settings import as_saved, check_same_data, how_it_goes_on, without_effect
from utils.training.state import State
from utils.training.wise_ft import Mixtures

Splits = dict[str, Flickr8kDataset]
Checkpoint = dict[str, Any]


def get_model(
    args: Namespace, resumed: Checkpoint | None, device: torch.device, processes: Processes
) -> CLIP:
    """The model to train, on the CPU: from a checkpoint, from weights, or random. Sets the seed."""
    SeedEvery(args.seed)
    is_from_scratch = resumed["start"] is None if resumed else args.resume_training == "none"
    with processes.rank_0_first():  # rank 0 downloads
        if resumed:
            model = resumed["model"]
        elif is_from_scratch:
            model = create_model(args.model, args.input_shape)
        else:
            model, _ = load(args.resume_training, "cpu", input_shape=args.input_shape,
                            activation=args.activation)  # fmt: skip
    freeze_and_adapt(model, args.lock_image, args.lock_text, args.lora)
    if is_from_scratch:
        model = whole_batch_norms(model, device, processes, args.grad_cache)
    return model


def get_loader(
    args: Namespace, sets: Splits, model: CLIP, device: torch.device, processes: Processes
) -> TrainLoader:
    """The batches to train on. Prepares all splits for the model."""
    by_default = 0 if device.type == "cpu" else 4
    num_workers = by_default if args.num_workers is None else args.num_workers
    for dataset in sets.values():
        dataset.prepare_for(model)
        dataset.check_texts()
    if args.cache is not None:
        with processes.rank_0_first():  # rank 0 decodes
            for dataset in sets.values():
                dataset.cache(args.cache or None, device, num_workers)
    if processes.is_rank_0:
        check_splits(sets, num_workers, train_too=args.strict)
    return TrainLoader(
        sets["train"], args.batch_size, device, args.seed, num_workers, augment=not args.no_augment,
        captions_per_image=args.captions_per_image, strict=args.strict, processes=processes,
        alter=bool(args.distill))  # fmt: skip


def open_run(
    args: Namespace,
    resumed: Checkpoint | None,
    model: CLIP,
    loader: TrainLoader,
    val_set: Flickr8kDataset,
) -> Run:
    """The run's folder with its arguments, console log and history of losses."""
    data = loader.dataset.fingerprint() + val_set.fingerprint()
    if resumed:
        check_same_data(data, resumed, args.resume_training, args.dataset_path)
    run = Run(loader.processes, as_saved(args, resumed), data)
    if not loader.processes.is_rank_0:
        return run
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    if resumed:
        run.folder = reopen_run_folder(args.resume_training, resumed)
    else:
        run.folder = new_run_folder(args.log_dir, started)
    with run.discarded_on_error():
        write_json(run.folder / ARGUMENTS, run.arguments)
        sys.stdout = Log(run.folder / f"console_{started}.log")
        show_config(args=args, color="bold")
        on = how_it_goes_on(args, resumed) if resumed else ()
        for line in (*on, *without_effect(args, len(loader), loader.processes)):
            print(line)
        run.loss_history = Losses(run.folder, resumed["rows"] if resumed else [])
        if args.wise_ft or args.distill:
            run.save_start(model, is_new=not resumed)
    return run


def get_state(
    args: Namespace, resumed: Checkpoint | None, model: CLIP, loader: TrainLoader, run: Run
) -> State:
    """The model on its device, its optimizer, and the checkpoint's state."""
    device = loader.device
    moved(model, device)
    optimizer = get_optimizer(model, args.optimizer_type, args.lr)
    groups = parameter_groups(model, args.momentum, args.weight_decay, args.layer_decay)
    replace_groups(optimizer, groups)
    distillation = None
    if args.distill:
        start = run.processes.broadcast(run.folder) / START
        distillation = distill_from_start(model, start, args.distill, loader.dataset.tokens)
    state = State(model, optimizer, Precision(device, args.use_amp), args.ema, distillation)
    if resumed:
        state.restore(resumed)
        run.replace_missing_best(state)
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    if args.compile:
        model.compile_towers()
        if distillation:
            distillation.start.compile_towers()
    return state


def finish(
    args: Namespace,
    folder: Path,
    sets: Splits,
    state: State,
    evaluator: Evaluator,
    retention: Retention,
    cached: Mapping[str, Tensor],
) -> None:
    """Choose the weights that count, and score them on validation, with `cached` features, and on
    the test split."""
    chosen, start = tuned_weights(folder), folder / START
    comment_on_epochs(state, len(sets["val"]))
    state.release()
    model, _ = load(chosen, state.precision.device)
    if args.wise_ft and not start.exists():
        print(f"{start} is missing: no --wise_ft; put it back and run this again")
    elif args.wise_ft:
        weights = load(start, "cpu")[0].state_dict()
        mixtures = Mixtures(model, weights, folder, args.max_forgetting)
        for alpha in mixtures.each(args.wise_ft):
            found = evaluator.score(model, sets["val"], cached=cached)
            mixtures.add(alpha, *found, retention.compare(model, state.start))
        chosen = mixtures.choose()
    report_chosen(evaluator, model, chosen, sets["val"])
    if "test" in sets:
        scores, _ = evaluator.score(model, sets["test"], k_values=range(1, 11))
        report_test(scores, chosen)
    print(what_to_try(sets["val"].image[0], chosen, sets["val"].text))
