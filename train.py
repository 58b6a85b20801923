"""Fine-tune CLIP on captioned images, or train it from scratch.

python train.py --demo                                    a small model, minutes on a CPU
python train.py --resume_training ViT-B/32                the published weights, on flickr8k/
python train.py --resume_training RUN/weights/checkpoint.pth       go on with a run
torchrun --standalone --nproc_per_node=2 train.py ...              on two GPUs
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from models.errors import InputError, run_script
from utils.annotations import missing_annotations, shared_images_warning
from utils.arguments import fraction, integer, name_or_path, number, path, positive

DEMO = {
    "dataset_path": "flickr8k/demo",
    "resume_training": "none",
    "model": "ViT-demo",
    "epochs": 28,
    "batch_size": 50,
}
FROM_SCRATCH = {"lr": 5e-4, "layer_decay": 1.0}
FINE_TUNING = {"lr": 1e-4, "layer_decay": 0.7}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--demo", action="store_true",
        help="render the demo set and train ViT-demo on it, a few minutes on a CPU")
    add("--resume_training", type=starting_point, default="ViT-B/32", metavar="NAME_OR_PATH",
        help="what to start from: a model name (downloaded if need be), a weights file, a run's "
        "weights/checkpoint.pth to continue that run with its own arguments and those given now, "
        "or none to train --model from scratch (default: %(default)s)")
    add("--model", help="architecture to train from scratch, with --resume_training none")
    add("--log_dir", type=path, default="logs", help="folder for the runs (default: %(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=0,
        help="of every random choice (default: %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", type=path, default="flickr8k",
        help="folder with images/ and {en,cn}_{train,val}.json (default: %(default)s)")
    add("--language", choices=["en", "cn"], nargs="+", default=["en"],
        help="captions to train on and to score with; several languages are mixed (default: en)")
    add("--input_shape", type=integer(1), metavar="PIXELS",
        help="side of the images (default: the model's own); another one than the weights' "
        "interpolates the positional embedding")
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
        help="decode every image once into a file in FOLDER (default: .cache in the data set), "
        "kept on the GPU where it fits")
    add("--num_workers", type=integer(0),
        help="processes that read images (default: 4 with a GPU, 0 without)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer(1), default=10,
        help="passes over the training images; the learning rate ends at zero after the last "
        "(default: %(default)s)")
    add("--batch_size", type=integer(2), default=64,
        help="images a step, on all GPUs together; more are more negatives (default: %(default)s)")
    add("--lr", type=positive,
        help="peak learning rate, that of the last layers (default: 1e-4, from scratch 5e-4)")
    add("--warmup_epochs", type=number(),
        help="epochs in which the rate rises to its peak, before it falls along a cosine "
        "(default: 1, or a tenth of --epochs if that is less)")
    add("--optimizer_type", choices=["adam", "adamw", "sgd"], default="adamw",
        help="adamw decays weights apart from the gradient, adam and sgd through it; sgd needs a "
        "far higher --lr (default: %(default)s)")
    add("--momentum", type=number(below=1), default=0.9,
        help="of SGD, or beta1 of Adam and AdamW (default: %(default)s)")
    add("--weight_decay", type=number(), default=0.1,
        help="on matrices; biases and gains are never decayed (default: %(default)s)")
    add("--patience", type=integer(1), metavar="EPOCHS",
        help="stop after so many epochs without a better mean recall")

    add = parser.add_argument_group("keeping what the weights could do").add_argument
    add("--layer_decay", type=fraction, metavar="FACTOR",
        help="each layer learns at FACTOR times the rate of the one after it (default: 0.7, from "
        "scratch 1)")
    add("--lock_image", type=integer(0), nargs="?", const=0, metavar="N",
        help="keep the image tower as it is, but for its last N blocks (default: none of them)")
    add("--lock_text", type=integer(0), nargs="?", const=0, metavar="N",
        help="keep the text tower as it is, but for its last N blocks (default: none of them)")
    add("--ema", type=number(below=1), metavar="DECAY",
        help="score and save an exponential moving average of the weights, such as 0.999")
    add("--wise_ft", type=fraction, nargs="+", metavar="ALPHA",
        help="score the weights between the start (0) and the best epoch (1) at each ALPHA, such "
        "as 0 0.25 0.5 0.75 1, and save the best; with 0 it is never worse than the start")

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
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--freq", type=integer(1), default=5, metavar="EPOCHS",
        help="keep the weights of every EPOCHS-th epoch (default: %(default)s)")
    add("--save_steps", type=integer(1), metavar="N",
        help="write the checkpoint after every N steps, too, not only after every epoch")
    # fmt: on
    return parser


def starting_point(text: str) -> str:
    """A name or path as it is, but for a run's folder its checkpoint."""
    text = name_or_path(text)
    checkpoint = Path(text) / "weights" / "checkpoint.pth"
    return str(checkpoint) if checkpoint.is_file() else text


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()

    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from models.clip import build_model
    from models.clip_utils import create_model, load
    from models.weights_file import read_state_dict
    from utils import checkpoint
    from utils.check_data import check_images
    from utils.engine import evaluate, peak_memory_mb, train_one_epoch
    from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
    from utils.interrupt import Interrupt
    from utils.layers import lock, whole_batch_norms
    from utils.metric import columns, format_table, mean_recall, plot_metrics
    from utils.optimizer import learning_rate, parameter_groups, restore
    from utils.precision import Precision
    from utils.ranks import join_ranks
    from utils.wise_ft import evaluate_path

    # Where to start: a demo and an earlier run bring arguments, which the command line overrides.
    resumed = None if args.demo else checkpoint.read_checkpoint(args.resume_training)
    if args.demo:
        parser.set_defaults(**DEMO)
    elif resumed:
        started_with = {"demo", "model", "resume_training"}
        saved = {k: v for k, v in resumed["arguments"].items() if k not in started_with}
        parser.set_defaults(**saved)
    args = parser.parse_args()
    recipe = FROM_SCRATCH if args.resume_training == "none" else FINE_TUNING
    for name, value in {**recipe, "warmup_epochs": min(1.0, args.epochs / 10)}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if resumed:
        check_resumed(args, saved, resumed)
    ranks, device = join_ranks(args.device)
    if args.demo and args.dataset_path == Path(DEMO["dataset_path"]):
        from flickr8k.render_demo import render_demo

        with ranks.first_ahead():
            render_demo(args.dataset_path)
    check_arguments(args)
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = 4 if device.type == "cuda" else 0

    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # a package of pyzjr's uses it
    from pyzjr import LossHistory, SeedEvery, get_optimizer, redirect_console, show_config

    SeedEvery(args.seed)

    # Model
    with ranks.first_ahead():  # which downloads
        if resumed:
            model = build_model(resumed["model"], args.input_shape)
        elif args.resume_training == "none":
            model = create_model(args.model, args.input_shape)
        else:
            model, _ = load(args.resume_training, "cpu", input_shape=args.input_shape)
    side = model.visual.input_resolution
    for tower, unlocked in (("image", args.lock_image), ("text", args.lock_text)):
        if unlocked is not None:
            lock(model, tower, unlocked)
    if ranks.size > 1 or args.grad_cache:
        model = whole_batch_norms(model, device, args.grad_cache)

    # Data
    train_set = Flickr8kDataset(args.dataset_path, side, args.language, is_train=True)
    val_set = Flickr8kDataset(args.dataset_path, side, args.language, is_train=False)
    if ranks.is_first:
        if warning := shared_images_warning(train_set.image, val_set.image):
            print(f"warning: {warning}")
        checked = [train_set, val_set] if args.check_data else [val_set]
        if broken := [line for one in checked for line in check_images(one, num_workers)]:
            raise InputError("\n  ".join([f"{len(broken)} images cannot be read:", *broken]))
    if args.cache is not None:
        with ranks.first_ahead():  # which decodes
            for dataset in (train_set, val_set):
                dataset.cache(args.cache or None, device, num_workers)
    data = train_set.fingerprint() + val_set.fingerprint()
    if resumed and data != resumed["data"]:
        raise InputError(
            f"--dataset_path {args.dataset_path}: its images or captions are not those of the run "
            "(or --language is not); to train on others, start a new run from the run's "
            "weights/last_epoch_weights.pth"
        )
    loader = TrainLoader(
        train_set, args.batch_size, device, args.seed, num_workers, not args.no_augment,
        args.captions_per_image, args.strict, ranks,
    )  # fmt: skip

    # Run folder; the first of several processes writes it
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    given = vars(args) | {"dataset_path": args.dataset_path.resolve()}
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    if resumed:  # what the run was started with
        arguments |= {name: resumed["arguments"][name] for name in started_with}
    rows = resumed["rows"] if resumed else []
    if ranks.is_first:
        if resumed:
            run = checkpoint.run_of_checkpoint(args.resume_training)
            checkpoint.restore_folder(run, rows)
        else:
            run = checkpoint.new_run_folder(args.log_dir, started)
        weights = run / "weights"
        checkpoint.write_json(run / "arguments.json", arguments)
        redirect_console(str(run / f"console_{started}.log"))
        show_config(args=args, color="bold")
        history = LossHistory(str(run), model, (side, side))  # leaves the model on the CPU
        history.losses = [row["train_loss"] for row in rows]
        history.val_loss = [row["val_loss"] for row in rows]
        if args.wise_ft and not resumed:
            checkpoint.save_weights(model, weights / "start_weights.pth")

    # Optimisation
    model.to(device)
    average = (
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    )
    scored = average.module if average else model
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    if args.compile:
        model.compile_towers()
    precision = Precision(device, args.use_amp)
    groups = parameter_groups(model, args.momentum, args.weight_decay, args.layer_decay)
    optimizer = get_optimizer(  # takes a model, and asks it only for its parameters
        SimpleNamespace(parameters=lambda: groups), args.optimizer_type, args.lr
    )
    rate_at = partial(
        learning_rate,
        peak=args.lr,
        warmup_steps=round(args.warmup_epochs * len(loader)),
        total_steps=args.epochs * len(loader),
    )
    losses = []  # of the steps that an interrupted epoch has behind it
    if resumed:
        restore(optimizer, resumed["optimizer"])
        if resumed["scaler"]:  # empty where no loss scale was needed
            precision.scaler.load_state_dict(resumed["scaler"])
        if average and resumed["average"]:
            average.load_state_dict(resumed["average"])
        losses = list(torch.tensor(resumed["losses"], device=device))
        del resumed  # a second copy of the weights

    if ranks.is_first:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        processes = f"{ranks.size} processes, " if ranks.size > 1 else ""
        print(f"{len(train_set)} training images, {len(val_set)} validation images, {processes}"
              f"{device}, {precision}, {millions:.1f} M parameters")  # fmt: skip
        texts = len(train_set.text) + len(val_set.text)
        if cut := train_set.count_cut_captions() + val_set.count_cut_captions():
            print(f"{cut} captions ({cut / texts:.2%}) are longer than 77 tokens and were cut")
        print(f"results in {run}")
    score = partial(evaluate, scored, val_set, args.batch_size, num_workers, precision, ranks=ranks)
    if not rows and not losses and args.resume_training != "none":
        metrics, _ = score()
        print(f"before training:\n{format_table(metrics)}")

    if len(rows) == args.epochs:
        print(f"the run has all {args.epochs} epochs behind it; --epochs with more goes on")
    interrupt = Interrupt()

    def save(losses: list[torch.Tensor]) -> None:
        """Write everything needed to go on after an epoch's steps with these losses."""
        if ranks.is_first:
            checkpoint.save_checkpoint(
                weights / "checkpoint.pth",
                arguments=arguments, data=data, rows=rows, losses=[x.item() for x in losses],
                model=model.state_dict(), average=average.state_dict() if average else None,
                optimizer=optimizer.state_dict(), scaler=precision.scaler.state_dict(),
            )  # fmt: skip

    def end() -> None:
        launch = "torchrun [as before]" if ranks.size > 1 else "python"
        if ranks.is_first:
            print(f"\nstopped by a signal; to go on:\n  {launch} train.py --resume_training "
                  f"{weights / 'checkpoint.pth'}")  # fmt: skip
        raise interrupt.exit()

    def after_step(losses: list[torch.Tensor]) -> None:
        if average:
            average.update_parameters(model)
        stop = ranks.any(interrupt.signal is not None)
        due = stop or (args.save_steps and len(losses) % args.save_steps == 0)
        if not due or not losses[-1].isfinite():  # such a loss ends the run with the next step
            return
        save(losses)
        if stop:
            end()

    for epoch in range(len(rows) + 1, args.epochs + 1):
        if args.patience and epochs_since_best(rows) >= args.patience:
            print(f"no better mean recall in {args.patience} epochs (--patience): training ends")
            break
        trained = train_one_epoch(
            model, loader, optimizer, precision, epoch, rate_at, after_step, losses, args.grad_cache
        )
        metrics, val_loss = score()
        recall = mean_recall(metrics)
        is_best = all(recall > row["mean_recall"] for row in rows)
        row = {"epoch": epoch, **trained, "val_loss": val_loss, "mean_recall": recall}
        rows.append(row | columns(metrics) | {"peak_memory_mb": peak_memory_mb(device)})
        losses = []
        print(
            f"epoch {epoch}/{args.epochs}: train loss {trained['train_loss']:.4f}, validation loss "
            f"{val_loss:.4f}, mean recall {recall:.2f}\n{format_table(metrics)}"
        )
        if ranks.is_first:
            if is_best:
                checkpoint.save_weights(scored, weights / "best_epoch_weights.pth")
            if epoch % args.freq == 0:
                named = f"loss{trained['train_loss']:.3f}_val_loss{val_loss:.3f}"
                checkpoint.save_weights(scored, weights / f"ep{epoch:03}_{named}.pth")
            checkpoint.save_weights(scored, weights / "last_epoch_weights.pth")
            save(losses)
            checkpoint.write_csv(run / "metrics.csv", rows)
            history.append_loss(epoch, trained["train_loss"], val_loss)
        if ranks.any(interrupt.signal is not None):
            end()
    interrupt.release()
    if not ranks.is_first:
        return
    history.close()

    # The best epoch, read back from its file, and the way to it
    best_weights = weights / "best_epoch_weights.pth"
    model, _ = load(best_weights, device)
    score = partial(evaluate, model, val_set, args.batch_size, num_workers, precision)
    metrics, _ = score(k_values=range(1, 11))
    plot_metrics(metrics, run / "R_mAP.png")
    print(f"the best epoch:\n{format_table(metrics)}\nplot: {run / 'R_mAP.png'}")
    if args.wise_ft:
        start = read_state_dict(weights / "start_weights.pth")
        curve = evaluate_path(model, start, args.wise_ft, score, run)
        best = max(curve, key=lambda point: point["mean_recall"])
        print("WiSE-FT, mean recall at alpha:", ", ".join(
            f"{point['mean_recall']:.2f} at {point['alpha']:g}" for point in curve))  # fmt: skip
        best_weights = weights / "wise_ft_weights.pth"
        print(f"the best, alpha {best['alpha']:g}: {best_weights}; plot: {run / 'wise_ft.png'}")
    print(f"now try\n  python predict.py {val_set.image[0]} --weights {best_weights}")
    print(f"  python predict_zero_shot.py {val_set.image[0]} --weights {best_weights} "
          f"--labels \"{val_set.text[0]}\" \"{val_set.text[-1]}\"")  # fmt: skip


def epochs_since_best(rows: list[dict]) -> int:
    """How many epochs have passed since the one with the best mean recall."""
    recalls = [row["mean_recall"] for row in rows]
    return len(rows) - 1 - recalls.index(max(recalls)) if rows else 0


def check_resumed(args: argparse.Namespace, saved: dict, resumed: dict) -> None:
    """Raise `InputError` for arguments with which a run cannot go on."""
    fixed = ["input_shape", "optimizer_type", "layer_decay", "lock_image", "lock_text", "wise_ft"]
    if resumed["losses"]:  # in the middle of an epoch
        fixed += ["batch_size", "captions_per_image", "no_augment", "seed"]
    for name in fixed:
        if getattr(args, name) != saved[name]:
            raise InputError(
                f"--{name}: a run goes on with its own, {saved[name]}; to change it, start a new "
                "run from the run's weights/last_epoch_weights.pth"
            )
    epochs_done = len(resumed["rows"])
    if args.epochs < epochs_done:
        raise InputError(f"--epochs {args.epochs}: the run has {epochs_done} epochs already")


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
    if args.wise_ft and args.resume_training == "none":
        raise InputError("--wise_ft mixes tuned weights with those they started from: it needs "
                         "--resume_training WEIGHTS")  # fmt: skip
    if args.lock_image == 0 and args.lock_text == 0:
        raise InputError("--lock_image and --lock_text together leave nothing to train: unlock "
                         "some blocks of one, such as --lock_text 2")  # fmt: skip
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} should be less than --epochs "
                         f"{args.epochs}")  # fmt: skip
    for language in args.language:
        if missing := missing_annotations(args.dataset_path / f"{language}_train.json"):
            raise InputError(
                f"{missing}. To get Flickr8k: python flickr8k/prepare.py --download; for data of "
                "yours: --dataset_path FOLDER; to see it work without any: python train.py --demo"
            )


if __name__ == "__main__":
    run_script(main)
