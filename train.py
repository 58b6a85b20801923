"""Fine-tune CLIP on captioned images, or train it from scratch.

python train.py --demo                                    a small model, minutes on a CPU
python train.py --resume_training ViT-B/32                the published weights, on flickr8k/
python train.py --resume_training RUN/weights/checkpoint.pth       go on with a run
"""

import argparse
import os
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from models.errors import InputError, run_script
from utils.arguments import integer, number, path, positive

DEMO = {
    "dataset_path": "flickr8k/demo",
    "resume_training": "none",
    "model": "ViT-demo",
    "epochs": 28,
    "batch_size": 50,
    "lr": 5e-4,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--demo", action="store_true",
        help="render the demo set and train ViT-demo on it, a few minutes on a CPU")
    add("--resume_training", type=os.path.expanduser, default="ViT-B/32", metavar="NAME_OR_PATH",
        help="what to start from: a model name (downloaded if need be), a weights file, a run's "
        "weights/checkpoint.pth to continue that run with its own arguments and those given now, "
        "or none to train "
        "--model from scratch (default: %(default)s)")
    add("--model", help="architecture to train from scratch, with --resume_training none")
    add("--dataset_path", type=path, default="flickr8k",
        help="folder with images/ and {en,cn}_{train,val}.json (default: %(default)s)")
    add("--language", choices=["en", "cn"], default="en",
        help="captions to train on (default: %(default)s)")
    add("--log_dir", type=path, default="logs", help="folder for the runs (default: %(default)s)")
    add("--epochs", type=integer(1), default=10,
        help="passes over the training images; the learning rate ends at zero after the last "
        "(default: %(default)s)")
    add("--input_shape", type=integer(1), metavar="PIXELS",
        help="side of the images (default: the model's own); another one than the weights' "
        "interpolates the positional embedding")
    add("--batch_size", type=integer(2), default=64,
        help="image-caption pairs a step; more pairs are more negatives (default: %(default)s)")
    add("--lr", type=positive, default=1e-5, help="peak learning rate (default: %(default)s)")
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
    add("--use_amp", action="store_true",
        help="mixed precision: bfloat16 where the device has it, else float16")
    add("--grad_checkpointing", action="store_true",
        help="less memory, more time: transformers compute their activations twice")
    add("--compile", action="store_true",
        help="torch.compile both towers: a slow first step, then faster ones on a GPU; "
        "needs a C++ compiler on a CPU, Triton on a GPU")
    add("--no_augment", action="store_true",
        help="train on whole images; otherwise a random crop keeps at least 90%% of each")
    add("--freq", type=integer(1), default=5, metavar="EPOCHS",
        help="keep the weights of every EPOCHS-th epoch (default: %(default)s)")
    add("--cache", nargs="?", const="", metavar="FOLDER",
        help="decode every image once into a file in FOLDER (default: .cache in the data set), "
        "kept on the GPU where it fits")
    add("--num_workers", type=integer(0),
        help="processes that read images (default: 4 with a GPU, 0 without)")
    add("--seed", type=integer(0, 2**32 - 1), default=0,
        help="of every random choice (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--debug", action="store_true", help="show the traceback of an error")
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()

    from models.clip import build_model
    from models.clip_utils import create_model, load, pick_device
    from utils import checkpoint
    from utils.engine import evaluate, peak_memory_mb, train_one_epoch
    from utils.flickr8k_dataloader import Flickr8kDataset, TrainLoader
    from utils.metric import format_table, mean_recall, plot_metrics
    from utils.optimizer import learning_rate, parameter_groups, restore
    from utils.precision import Precision

    # Where to start: a demo and an earlier run bring arguments, which the command line overrides.
    resumed = None if args.demo else checkpoint.read_checkpoint(args.resume_training)
    if args.demo:
        parser.set_defaults(**DEMO)
    elif resumed:
        started_with = {"demo", "model", "resume_training"}
        saved = {k: v for k, v in resumed["arguments"].items() if k not in started_with}
        parser.set_defaults(**saved)
    args = parser.parse_args()
    if args.warmup_epochs is None:
        args.warmup_epochs = min(1.0, args.epochs / 10)
    if resumed:
        check_resumed(args, saved, len(resumed["rows"]))
    if args.demo and args.dataset_path == Path(DEMO["dataset_path"]):
        from flickr8k.render_demo import render_demo

        render_demo(args.dataset_path)
    check_arguments(args)
    device = pick_device(args.device)
    num_workers = args.num_workers
    if num_workers is None:
        num_workers = 4 if device.type == "cuda" else 0

    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # a package of pyzjr's uses it
    from pyzjr import LossHistory, SeedEvery, get_optimizer, redirect_console, show_config

    SeedEvery(args.seed)

    # Model
    if resumed:
        model = build_model(resumed["model"], args.input_shape)
    elif args.resume_training == "none":
        model = create_model(args.model, args.input_shape)
    else:
        model, _ = load(args.resume_training, "cpu", input_shape=args.input_shape)
    side = model.visual.input_resolution

    # Data
    train_set = Flickr8kDataset(args.dataset_path, side, args.language, is_train=True)
    val_set = Flickr8kDataset(args.dataset_path, side, args.language, is_train=False)
    if args.cache is not None:
        for dataset in (train_set, val_set):
            dataset.cache(args.cache or None, device, num_workers)
    loader = TrainLoader(
        train_set, args.batch_size, device, args.seed, num_workers, not args.no_augment
    )

    # Run folder
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    if resumed:
        run = checkpoint.run_of_checkpoint(args.resume_training)
    else:
        run = checkpoint.new_run_folder(args.log_dir, started)
    weights = run / "weights"
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    checkpoint.write_json(run / "arguments.json", arguments)
    redirect_console(str(run / f"console_{started}.log"))
    show_config(args=args, color="bold")
    history = LossHistory(str(run), model, (side, side))  # leaves the model on the CPU
    model.to(device)
    if args.grad_checkpointing:
        model.enable_grad_checkpointing()
    if args.compile:
        model.compile_towers()

    # Optimisation
    precision = Precision(device, args.use_amp)
    groups = parameter_groups(model, args.momentum, args.weight_decay)
    optimizer = get_optimizer(  # takes a model, and asks it only for its parameters
        SimpleNamespace(parameters=lambda: groups), args.optimizer_type, args.lr
    )
    rate_at = partial(
        learning_rate,
        peak=args.lr,
        warmup_steps=round(args.warmup_epochs * len(loader)),
        total_steps=args.epochs * len(loader),
    )
    rows, best = [], -1.0
    if resumed:
        restore(optimizer, resumed["optimizer"])
        if resumed["scaler"]:  # empty where no loss scale was needed
            precision.scaler.load_state_dict(resumed["scaler"])
        rows, best = resumed["rows"], resumed["best"]
        history.losses = [row["train_loss"] for row in rows]
        history.val_loss = [row["val_loss"] for row in rows]
        del resumed  # a second copy of the weights

    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{len(train_set)} training images, {len(val_set)} validation images, {device}, "
          f"{precision}, {millions:.1f} M parameters")  # fmt: skip
    cut = train_set.count_cut_captions() + val_set.count_cut_captions()
    if cut:
        print(f"{cut} captions are longer than 77 tokens and were cut")
    print(f"results in {run}")
    score = partial(evaluate, model, val_set, args.batch_size, num_workers, precision)
    if not rows and args.resume_training != "none":
        metrics, _ = score()
        print(f"before training:\n{format_table(metrics)}")

    for epoch in range(len(rows) + 1, args.epochs + 1):
        trained = train_one_epoch(model, loader, optimizer, precision, epoch, rate_at)
        metrics, val_loss = score()
        history.append_loss(epoch, trained["train_loss"], val_loss)
        row = {"epoch": epoch, **trained, "val_loss": val_loss, "mean_recall": mean_recall(metrics)}
        row |= {f"{way}_{name}": value for way in metrics for name, value in metrics[way].items()}
        rows.append(row | {"peak_memory_mb": peak_memory_mb(device)})
        print(
            f"epoch {epoch}/{args.epochs}: train loss {trained['train_loss']:.4f}, validation loss "
            f"{val_loss:.4f}, mean recall {row['mean_recall']:.2f}\n{format_table(metrics)}"
        )
        if row["mean_recall"] > best:
            best = row["mean_recall"]
            checkpoint.save_weights(model, weights / "best_epoch_weights.pth")
        if epoch % args.freq == 0:
            losses = f"loss{trained['train_loss']:.3f}_val_loss{val_loss:.3f}"
            checkpoint.save_weights(model, weights / f"ep{epoch:03}_{losses}.pth")
        checkpoint.save_weights(model, weights / "last_epoch_weights.pth")
        checkpoint.save_checkpoint(
            weights / "checkpoint.pth",
            arguments=arguments, model=model.state_dict(), optimizer=optimizer.state_dict(),
            scaler=precision.scaler.state_dict(), rows=rows, best=best,
        )  # fmt: skip
        checkpoint.write_csv(run / "metrics.csv", rows)
    history.close()

    # The best epoch, read back from its file
    best_weights = weights / "best_epoch_weights.pth"
    model, _ = load(best_weights, device)
    metrics, _ = evaluate(
        model, val_set, args.batch_size, num_workers, precision, k_values=range(1, 11)
    )
    plot_metrics(metrics, run / "R_mAP.png")
    print(f"the best epoch:\n{format_table(metrics)}\nplot: {run / 'R_mAP.png'}\nnow try")
    print(f"  python predict.py {val_set.image[0]} --weights {best_weights}")
    print(f"  python predict_zero_shot.py {val_set.image[0]} --weights {best_weights} "
          f"--labels \"{val_set.text[0]}\" \"{val_set.text[-1]}\"")  # fmt: skip


def check_resumed(args: argparse.Namespace, saved: dict, epochs_done: int) -> None:
    """Raise `InputError` for arguments with which a run cannot go on."""
    for name in ("input_shape", "optimizer_type"):
        if getattr(args, name) != saved[name]:
            raise InputError(
                f"--{name}: a run goes on with its own, {saved[name]}; to change it, start a new "
                "run from the run's weights/last_epoch_weights.pth"
            )
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
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup_epochs {args.warmup_epochs:g} should be less than --epochs "
                         f"{args.epochs}")  # fmt: skip
    if not (args.dataset_path / f"{args.language}_train.json").is_file():
        raise InputError(
            f"{args.dataset_path}: there is no {args.language}_train.json in it. To get Flickr8k: "
            "python flickr8k/prepare.py --download; for data of yours: --dataset_path FOLDER; to "
            "see it work without any: python train.py --demo"
        )


if __name__ == "__main__":
    run_script(main)
