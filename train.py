"""Fine-tune CLIP on captioned images, or train it from scratch.

python train.py --demo                                    a small model, minutes on a CPU
python train.py --resume_training ViT-B/32                the published weights, on flickr8k/
python train.py --resume_training logs/RUN                go on with a run
torchrun --standalone --nproc_per_node=2 train.py ...     on two GPUs
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from models.config import MAX_RESOLUTION
from models.host import garbage_unsearched, run_script
from models.scripts import ArgumentParser, add_activation, from_here
from utils.runs.arguments import fraction, integer, number, path, positive, starting_point, workers


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--demo", action="store_true",
        help="render the demo set and train a small model on it, a few minutes on a CPU")
    add("--resume_training", type=starting_point, default="ViT-B/32", metavar="NAME_OR_PATH",
        help="what to start from: a model name (downloaded if need be), a weights file, a run's "
        "folder to continue that run with its own arguments and those given now, or none to train "
        "--model from scratch (default: %(default)s)")
    add("--model", help="architecture to train from scratch, with --resume_training none")
    add_activation(parser)
    add("--log_dir", type=path, default="logs", help="folder for the runs (default: %(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="for random choices (default: 0)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", type=path, default=from_here("flickr8k"),
        help="folder with images and {en,cn}_{train,val}.json, .csv, ... (default: %(default)s)")
    add("--language", choices=["en", "cn"], nargs="+", default=["en"],
        help="captions to train on and to score with; several languages are mixed (default: en)")
    add("--input_shape", type=integer(1, MAX_RESOLUTION), metavar="PIXELS",
        help="side of the images; the positional embedding is interpolated (default: the model's)")
    add("--captions_per_image", type=integer(1), default=2, metavar="K",
        help="captions of an image in a step, all of them right answers; where no image has so "
        "many, as many as there are (default: %(default)s)")
    add("--no_augment", action="store_true",
        help="train on whole images; otherwise a random crop keeps at least 90%% of each")
    add("--check_data", action="store_true",
        help="read every image before training, and stop with a list of those that are broken")
    add("--strict", action="store_true",
        help="stop at a training image that cannot be read; otherwise another takes its place")
    add("--cache", nargs="?", const="", metavar="FOLDER",
        help="decode images once, into FOLDER (default: .cache in the data), as --retention does")
    add("--num_workers", type=workers,
        help="processes that read images (default: 4 with a GPU, 0 without)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer(1), default=20,
        help="passes over the training images; the rate ends at zero (default: %(default)s)")
    add("--batch_size", type=integer(2), default=64,
        help="images a step, on all GPUs together: as many as fit (default: %(default)s)")
    add("--lr", type=positive,
        help="peak learning rate (default: 0.115 / the model's width, 1.5e-4 for ViT-B/32; with "
        "--lora 3e-3; from scratch 5e-4)")
    add("--warmup_epochs", type=number(),
        help="epochs in which the rate rises to its peak, before it falls along a cosine "
        "(default: 1, or a tenth of --epochs if that is less)")
    add("--optimizer_type", choices=["adam", "adamw", "sgd"], default="adamw",
        help="adamw decays weights apart from the gradient, adam and sgd through it; sgd needs a "
        "far higher --lr (default: %(default)s)")
    add("--momentum", type=number(below=1), default=0.9,
        help="of SGD, or beta1 of Adam and AdamW (default: %(default)s)")
    add("--weight_decay", type=number(), default=0.1, help="of matrices (default: %(default)s)")
    add("--patience", type=integer(1), metavar="EPOCHS",
        help="stop after so many epochs without a better mean recall")

    add = parser.add_argument_group("keeping what the weights could do").add_argument
    add("--layer_decay", type=fraction, default=1.0, metavar="FACTOR",
        help="each layer learns at FACTOR times the rate of the next one (default: %(default)g)")
    add("--lock_image", type=integer(0), nargs="?", const=0, metavar="N",
        help="keep the image tower as it is, but for its last N blocks (default: none of them)")
    add("--lock_text", type=integer(0), nargs="?", const=0, metavar="N",
        help="keep the text tower as it is, but for its last N blocks (default: none of them)")
    add("--cache_features", action="store_true",
        help="compute features of a locked tower once, not in each step; for images, --no_augment")
    add("--lora", type=integer(1, 1024), metavar="RANK",
        help="less memory: learn only changes of this rank, such as 8, of transformers' matrices")
    add("--distill", type=number(), metavar="WEIGHT",
        help="WEIGHT in the loss of the distance of features to those of the start, on images in "
        "random colours and captions of random words: 12 forgets less, 0 is faster (default: 6)")
    add("--ema", type=number(below=1), metavar="DECAY",
        help="score and save an exponential moving average of the weights, such as 0.999")
    add("--wise_ft", type=fraction, nargs="+", metavar="ALPHA",
        help="score mixtures of the start (0) and the trained weights (1) at each ALPHA, and save "
        "the best (default: 0 0.25 0.5 0.75 1)")
    add("--retention", type=path, nargs="+", metavar="DATA",
        help="measure as training goes on what is left on DATA: a folder of class folders or a set "
        "of torchvision (zero-shot top-1), or a folder like --dataset_path (mean recall)")
    add("--max_forgetting", type=number(), metavar="POINTS",
        help="with --retention, --wise_ft takes the best mixture that loses at most so many points "
        "there (default: 2)")

    add = parser.add_argument_group("memory, speed, interruptions").add_argument
    add("--use_amp", action="store_true",
        help="mixed precision: bfloat16 where the device has it, else float16")
    add("--grad_cache", type=integer(1), metavar="N",
        help="compute the very same gradients with activations of N images at a time")
    add("--grad_checkpointing", action="store_true",
        help="less memory, more time: transformers compute their activations twice")
    add("--compile", action="store_true",
        help="torch.compile both towers: a slow first step, then faster ones on a GPU; "
        "needs a C++ compiler on a CPU, Triton on a GPU")
    add("--device", help="cuda, cuda:1, mps (a Mac's GPU) or cpu (default: the first there is)")
    add("--freq", type=integer(1), default=5, metavar="EPOCHS",
        help="keep the weights of every EPOCHS-th epoch (default: %(default)s)")
    add("--save_steps", type=integer(1), metavar="N", help="write the checkpoint each N steps, too")
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    parser.parse_args()  # --help and typing errors answer at once, before torch is imported

    from utils.machine.interrupt import Interrupt
    from utils.machine.memory import IN_TRAINING, explained
    from utils.machine.processes import join_processes
    from utils.retrieval.evaluation import Evaluator
    from utils.training.gradients import accumulate_gradients
    from utils.training.layer_groups import cache_features, train_mode
    from utils.training.optimizer import learning_rate, set_learning_rate
    from utils.training.progress import Progress, announce, report_epoch, report_start
    from utils.training.settings import resolve_arguments

    args, resumed = resolve_arguments(parser)
    processes, device = join_processes(args.device)
    sets, retention = prepare(args, device, processes)

    model = get_model(args, resumed, device, processes)
    loader = get_loader(args, sets, model, device, processes)
    retention.prepare_for(model, loader, args.cache)
    run = open_run(args, resumed, model, loader, sets["val"])
    with run.discarded_on_error():  # before its first step there is nothing to keep
        state = get_state(args, resumed, model, device, run)
        del resumed  # a second copy of the moments
        announce(state, loader, sets, args.epochs, run.folder)
        cached = cache_features(args, model, loader, sets["val"], state.precision)
        evaluator = Evaluator(loader, state.precision, processes)
        if state.is_at_start and args.resume_training != "none":
            scores, val_loss = evaluator.score(state.scored, sets["val"], cached=cached)
            state.note_start(scores, val_loss, retention.measure(state.scored, processes))
            report_start(state, scores)
        interrupt = Interrupt()

    rate_at = partial(learning_rate, peak=args.lr, total_steps=args.epochs * len(loader),
                      warmup_steps=round(args.warmup_epochs * len(loader)))  # fmt: skip
    for epoch in range(len(state.epochs) + 1, args.epochs + 1):
        if args.patience and state.epochs_since_best >= args.patience:
            print(f"no better mean recall in {args.patience} epochs (--patience): training ends")
            break
        train_mode(model)
        done = len(state.losses)  # steps of an epoch that was interrupted
        with explained(IN_TRAINING), Progress(loader, epoch, done) as progress:
            first = (epoch - 1) * len(loader) + done
            for step, batch in enumerate(progress.timed(loader.epoch(epoch, done)), first):
                set_learning_rate(state.optimizer, rate_at(step))
                loss = accumulate_gradients(
                    model, batch, state.precision, processes, args.grad_cache, state.distillation
                )
                state.update(processes.sum(loss))
                progress.advance(state.losses[-1], rate_at(step), step)
                stop = processes.any(interrupt.has_come())
                due = stop or (args.save_steps and len(state.losses) % args.save_steps == 0)
                if due and state.losses[-1].isfinite():  # another one ends the run in the next step
                    run.save_checkpoint(state.state_dict())
                    if stop:
                        raise run.stopped(interrupt)
            trained = progress.summary(state.losses, rate_at(epoch * len(loader) - 1))
        scores, val_loss = evaluator.score(state.scored, sets["val"], cached=cached)
        retained = retention.measure(state.scored, processes)
        state.finish_epoch(trained, scores, val_loss, retained)
        report_epoch(state, args.epochs, scores, len(sets["val"]), args.lr)
        run.save_epoch(state.scored, state.state_dict(), args.freq)
        if processes.any(interrupt.has_come()):
            raise run.stopped(interrupt)
    interrupt.release()
    run.close(state.scored, state.state_dict())
    if processes.is_rank_0:
        finish(args, run.folder, loader, sets, state, retention=retention, cached=cached)


@garbage_unsearched()
def prepare(args: argparse.Namespace, device, processes):
    """Check the arguments, render the demo's images, seed every random choice; the data by split,
    and that of --retention. Comes before the weights, which may take minutes to download."""
    from flickr8k.render_demo import render_demo
    from utils.machine.pyzjr_parts import SeedEvery
    from utils.training.retention import Retention
    from utils.training.settings import check_arguments, check_model, read_data, wants_demo_set

    if wants_demo_set(args):
        with processes.rank_0_first():
            render_demo(args.dataset_path, folder_option="--dataset_path")
    check_arguments(args)
    check_model(args, device, processes)
    sets = read_data(args, processes)
    retention = Retention(args.retention or [], args.language, processes)
    SeedEvery(args.seed)
    return sets, retention


def get_model(args: argparse.Namespace, resumed: dict | None, device, processes):
    """The model to train, on the CPU: from a checkpoint, from weights, or with random weights."""
    from models.clip_utils import create_model, load
    from utils.training.layer_groups import trainable
    from utils.training.settings import fine_tuning_rate

    with processes.rank_0_first():  # which downloads
        if resumed:
            model = resumed["model"]
        elif args.resume_training == "none":
            model = create_model(args.model, args.input_shape)
        else:
            model, _ = load(args.resume_training, "cpu", input_shape=args.input_shape,
                            activation=args.activation)  # fmt: skip
    args.lr = args.lr or fine_tuning_rate(model.config, args.lora)
    return trainable(model, args, device, processes)


def get_loader(args: argparse.Namespace, sets: dict, model, device, processes):
    """The batches to train on; afterwards all data is as the model takes it."""
    from utils.data.image_files import check_splits
    from utils.flickr8k_dataloader import TrainLoader
    from utils.machine.memory import check_images_fit

    by_default = 0 if device.type == "cpu" else 4
    num_workers = by_default if args.num_workers is None else args.num_workers
    for dataset in sets.values():
        dataset.prepare_for(model)
        dataset.check_texts()
    at_once = min(args.batch_size, args.grad_cache or args.batch_size)
    check_images_fit(at_once // processes.size, model.visual.input_resolution, device)
    if args.cache is not None:
        with processes.rank_0_first():  # which decodes
            for dataset in sets.values():
                dataset.cache(args.cache or None, device, num_workers)
    if processes.is_rank_0:
        check_splits(sets, num_workers, train_too=args.check_data)
    return TrainLoader(
        sets["train"], args.batch_size, device, args.seed, num_workers, augment=not args.no_augment,
        captions_per_image=args.captions_per_image, strict=args.strict, processes=processes,
        alter=bool(args.distill))  # fmt: skip


def open_run(args: argparse.Namespace, resumed: dict | None, model, loader, val_set):
    """The run's folder with its arguments, the console's log and the history of losses."""
    from utils.machine.pyzjr_parts import show_config
    from utils.runs.checkpoint import write_json
    from utils.runs.folder import Run, new_run_folder, reopen_run_folder
    from utils.runs.records import Log, Losses
    from utils.training.settings import as_saved, check_same_data, how_it_goes_on, without_effect

    data = loader.dataset.fingerprint() + val_set.fingerprint()
    check_same_data(args, data, resumed)
    run = Run(loader.processes, as_saved(args, resumed), data)
    if not loader.processes.is_rank_0:
        return run
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    if resumed:
        run.folder = reopen_run_folder(args.resume_training, resumed)
        run.best_since = resumed["best_since"]
    else:
        run.folder = new_run_folder(args.log_dir, started)
    with run.discarded_on_error():
        write_json(run.folder / "arguments.json", run.arguments)
        sys.stdout = Log(run.folder / f"console_{started}.log")
        show_config(args=args, color="bold")
        on = how_it_goes_on(args, resumed) if resumed else ()
        for line in (*on, *without_effect(args, len(loader))):
            print(line)
        run.loss_history = Losses(run.folder, resumed["rows"] if resumed else [])
        if args.wise_ft or args.distill:
            run.keep_start(model, is_new=not resumed)
    return run


def get_state(args: argparse.Namespace, resumed: dict | None, model, device, run):
    """What training starts with: the model on its device, an optimizer, what a checkpoint has."""
    from utils.machine.precision import Precision
    from utils.machine.pyzjr_parts import get_optimizer
    from utils.training.distillation import distill_from_start
    from utils.training.optimizer import parameter_groups, replace_groups
    from utils.training.state import State

    model.to(device)
    optimizer = get_optimizer(model, args.optimizer_type, args.lr)
    groups = parameter_groups(model, args.momentum, args.weight_decay, args.layer_decay)
    replace_groups(optimizer, groups)
    distillation = distill_from_start(model, run, args.distill) if args.distill else None
    state = State(model, optimizer, Precision(device, args.use_amp), args.ema, distillation)
    if resumed:
        state.restore(resumed)
        run.replace_missing_best(state.scored, state.state_dict())
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    if args.compile:
        model.compile_towers()
    return state


def finish(args: argparse.Namespace, folder: Path, loader, sets, state, retention, cached) -> None:
    """Choose weights, and score them: on validation, some features of which may be `cached`, and on
    the test split. With --distill the last epoch counts: the best may be further from the start."""
    from models.clip_utils import load
    from utils.retrieval.evaluation import Evaluator
    from utils.runs.commands import what_to_try
    from utils.training.progress import comment_on_epochs, report_chosen, report_test
    from utils.training.wise_ft import mix_with_start

    chosen = folder / "weights" / f"{'last' if args.distill else 'best'}_epoch_weights.pth"
    state.release()
    model, _ = load(chosen, state.precision.device)
    evaluator = Evaluator(loader, state.precision)
    comment_on_epochs(state, len(sets["val"]))
    if args.wise_ft:
        kept = partial(retention.compare, model, state.start)
        score = partial(evaluator.score, model, sets["val"], cached=cached)
        chosen = mix_with_start(model, args, score, kept, chosen)
    report_chosen(evaluator, model, chosen, sets["val"])
    if "test" in sets:
        scores, _ = evaluator.score(model, sets["test"], k_values=range(1, 11))
        report_test(scores, chosen, folder)
    print(what_to_try(sets["val"].image[0], chosen, sets["val"].text))


if __name__ == "__main__":
    run_script(main)
