"""Fine-tune CLIP on captioned images, or train it from scratch.

python train.py --demo                          a small model, minutes on a CPU
python train.py --resume_training ViT-B/32      tune OpenAI's, on flickr8k/
python train.py --dataset_path my_data          the same, on your own data
python train.py --resume_training logs/RUN      go on with a run
torchrun --standalone --nproc_per_node=2 train.py ...     on two GPUs
"""

from argparse import Namespace

from models.config import MAX_RESOLUTION
from models.host import garbage_unsearched, run_script
from models.scripts import ArgumentParser, add_activation, from_here
from utils.runs.arguments import (
    fraction,
    integer,
    name_or_path,
    number,
    path,
    positive,
    shards,
    starting_point,
    workers,
)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # fmt: off
    add("--demo", action="store_true",
        help="render the demo set and train a small model on it, a few minutes on a CPU")
    add("--resume_training", type=starting_point, default="ViT-B/32", metavar="NAME_OR_PATH",
        help="what to start from: a model name (downloaded if needed), a weights file, a run's "
        "folder to continue that run with its own arguments and those given now, or none to train "
        "--model from scratch (default: %(default)s)")
    add("--model", metavar="NAME",
        help="architecture to train from scratch, such as ViT-demo or ViT-B/32; add "
        "--resume_training none")
    add_activation(parser)
    add("--log_dir", type=path, default="logs", help="folder for the runs (default: %(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=0,
        help="another number, other random choices (default: %(default)s)")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", type=path, default=from_here("flickr8k"),
        help="folder with images and {en,cn}_{train,val}.json, .csv, ..., or one table with a "
        "column split; or with folders train/ and val/ of tar shards, of images beside texts, of "
        "class folders or of Hugging Face's datasets (default: %(default)s)")
    add("--stream", type=shards, nargs="+", metavar="SHARDS",
        help="stream the training data from tar shards, where a disk is too small or too far; what "
        "webdataset opens (pip install webdataset), such as \"cc3m/{00000..00331}.tar\"; "
        "--dataset_path is for validation alone")
    add("--stream_samples", type=integer(1), metavar="N",
        help="samples in all shards (default: read from shards on a disk, or beside them)")
    add("--language", choices=["en", "cn"], nargs="+", default=["en"],
        help="language of the captions in training and scoring; two are mixed (default: en)")
    add("--input_shape", type=integer(1, MAX_RESOLUTION), metavar="PIXELS",
        help="side of the images; the positional embedding is interpolated (default: the model's)")
    add("--captions_per_image", type=integer(1), default=2, metavar="K",
        help="captions sampled per image and step; all are positives (default: %(default)s)")
    add("--no_augment", action="store_true",
        help="train on whole images; otherwise a random crop keeps at least 90%% of each")
    add("--strict", action="store_true",
        help="read every training image first, and stop with a list of those that are broken; "
        "otherwise another image takes the place of each")
    add("--cache", nargs="?", const="", metavar="FOLDER",
        help="decode images once, into FOLDER (default: .cache in the data), as --retention does")
    add("--val_images", type=integer(1), default=5000, metavar="N",
        help="of more validation images, score N random ones after each epoch, all at the end "
        "(default: %(default)s)")
    add("--num_workers", type=workers,
        help="processes that read images (default: 4 with a GPU, 0 without)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer(1),
        help="passes over the training images (default: 10; from scratch 20)")
    add("--batch_size", type=integer(2), default=64,
        help="images per step, on all GPUs together; take as many as fit (default: %(default)s)")
    add("--lr", type=positive,
        help="peak learning rate (default: 1e-5 x 768 / the model's width x the root of "
        "--batch_size / 64, at most 5e-5; with --lora 2e-4; from scratch 5e-4)")
    add("--warmup_epochs", type=number(),
        help="epochs until the rate has risen to its peak; then it falls along a cosine (default: "
        "a twentieth of the steps, but at least 50 steps, and at most a fifth)")
    add("--optimizer_type", choices=["adam", "adamw", "sgd"], default="adamw",
        help="adam and sgd add the weight decay to the gradient, adamw does not; sgd needs a far "
        "higher --lr (default: %(default)s)")
    add("--momentum", type=number(below=1), default=0.9,
        help="momentum of SGD; beta1 of Adam and AdamW (default: %(default)s)")
    add("--weight_decay", type=number(), default=0.1,
        help="weight decay of matrices; biases and gains have none (default: %(default)s)")
    add("--patience", type=integer(0), metavar="EPOCHS",
        help="stop after EPOCHS without better mean recall; 0: never (default: 3; from scratch 0)")

    add = parser.add_argument_group("against forgetting").add_argument
    add("--layer_decay", type=fraction, default=1.0, metavar="FACTOR",
        help="each layer learns at FACTOR times the rate of the next one (default: %(default)g)")
    add("--lock_image", type=integer(0), nargs="?", const=0, metavar="N",
        help="freeze the image tower; with N, all but its last N blocks")
    add("--lock_text", type=integer(0), nargs="?", const=0, metavar="N",
        help="freeze the text tower; with N, all but its last N blocks")
    add("--cache_features", action="store_true",
        help="compute the features of a frozen tower once; for images, add --no_augment")
    add("--lora", type=integer(1, 1024), metavar="RANK",
        help="train low-rank changes of the transformers' matrices, of RANK such as 8: less memory")
    add("--distill", type=number(), metavar="WEIGHT",
        help="weight of distillation: features stay near those of the starting model, on images in "
        "random colours and captions of random words; 6 for pictures that are foreign to the model "
        "(drawings, scans, other sensors) and where old abilities must stay (default: 0, none)")
    add("--distill_data", type=name_or_path, nargs="+", metavar="PATH",
        help="distil on these images of any kind (a folder) and sentences (a text file with one a "
        "line) instead; --distill is then 6 by default")
    add("--no_guard", action="store_true",
        help="for research: go on where mean recall has fallen clearly below the start; otherwise "
        "the run goes back to the starting weights, with a third of the rate")
    add("--ema", type=number(below=1), metavar="DECAY",
        help="score and save an exponential moving average of the weights, such as 0.999")
    add("--wise_ft", type=fraction, nargs="+", metavar="ALPHA",
        help="score mixtures of the start (0) and the best and the last epoch (1) at each ALPHA, "
        "and save the best (default: 0 0.1 ... 1)")
    add("--retention", type=name_or_path, nargs="+", metavar="DATA",
        help="after each epoch, also score DATA: a folder of class folders or a set of torchvision "
        "(zero-shot top-1), or a folder like --dataset_path (mean recall)")
    add("--max_forgetting", type=number(), metavar="POINTS",
        help="points that the mixture of --wise_ft may lose on sets of --retention (default: 2)")

    add = parser.add_argument_group("memory, speed, interruptions").add_argument
    add("--use_amp", action="store_true",
        help="mixed precision: bfloat16 where the device has it, else float16")
    add("--grad_cache", type=integer(1), metavar="N",
        help="the same gradients, but with the activations of only N images at a time")
    add("--grad_checkpointing", action="store_true",
        help="less memory, more time: transformers compute activations twice")
    add("--compile", action="store_true",
        help="torch.compile both towers: a slow first step, then faster ones on a GPU; "
        "needs a C++ compiler on a CPU, Triton on a GPU")
    add("--device", help="cuda, cuda:1, mps (a Mac's GPU) or cpu (default: the first there is)")
    add("--wandb", action="store_true",
        help="also send losses and scores to wandb, into a project with the name of --log_dir's "
        "folder (pip install wandb)")
    add("--freq", type=integer(1), default=5, metavar="EPOCHS",
        help="keep the weights of every EPOCHS-th epoch (default: %(default)s)")
    add("--save_steps", type=integer(1), metavar="N", help="also save the checkpoint each N steps")
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    defaults = parser.parse_args([])
    given = Namespace(**dict.fromkeys(vars(defaults)))  # None is what the command line leaves open
    parser.parse_args(namespace=given)  # --help answers before torch is imported
    with garbage_unsearched():
        from utils.machine.interrupt import Interrupt
        from utils.machine.memory import IN_TRAINING, explained
        from utils.machine.processes import join_processes
        from utils.retrieval.evaluation import Evaluator
        from utils.training.gradients import accumulate_gradients
        from utils.training.guard import Guard
        from utils.training.layer_groups import cache_features, train_mode
        from utils.training.optimizer import Schedule, set_learning_rate
        from utils.training.progress import EpochTable, Progress, announce, epochs_left
        from utils.training.settings import default_rate, get_data, resolve_arguments

    args, resumed = resolve_arguments(given, defaults)
    processes, device = join_processes(args.device)
    sets, retention, unlabelled = get_data(args, processes)
    from utils.training import phases  # pyzjr, which it imports, takes seconds: after the checks

    model = phases.get_model(args, resumed, device, processes)
    args.lr = args.lr or default_rate(model.config, args.batch_size, args.lora)
    loader = phases.get_loader(args, sets, model, device, processes, unlabelled=unlabelled)
    retention.prepare_for(model, loader, args.cache)
    run, steps = phases.open_run(args, resumed, model, loader, sets), len(loader)
    state = phases.get_state(args, resumed, model, loader, run)
    del resumed  # a second copy of the moments
    val = sets["val"].sample(args.val_images)  # scored after each epoch
    announce(run, state, loader, sets, args.epochs)
    table = EpochTable(state, args.epochs, steps)
    evaluator = Evaluator(loader, state.precision, processes)
    cached = cache_features(model, loader, val, state.precision) if args.cache_features else {}
    guard = Guard(evaluator, val, run.start_weights(), cached)
    if state.is_at_start and args.resume_training != "none":
        scores, val_loss = evaluator.score(state.scored, val, cached=cached)
        state.note_start(scores, val_loss, retention.measure(state.scored, processes))
        table.add_start()
        if not args.no_guard:
            guard.note_start(state, scores)
    interrupt = Interrupt()

    warmup_steps = args.warmup_epochs and round(args.warmup_epochs * steps)
    schedule = Schedule(args.lr, warmup_steps, args.epochs * steps)
    for epoch in epochs_left(state, args.epochs, args.patience):
        train_mode(model, state.is_from_scratch)
        done = len(state.losses)  # steps of an epoch that was interrupted
        with explained(IN_TRAINING), Progress(loader, epoch, done) as progress:
            first = (epoch - 1) * steps + done
            for step, batch in enumerate(progress.timed(loader.epoch(epoch, done)), first):
                guard.before_step(state, step)
                rate = schedule.rate(step, state.restarts)
                set_learning_rate(state.optimizer, rate)
                loss = accumulate_gradients(
                    model, batch, state.precision, processes,
                    chunk=args.grad_cache, distillation=state.distillation,
                )  # fmt: skip
                state.update(processes.sum(loss))
                progress.advance(state.losses[-1], rate, step)
                stop = processes.any(interrupt.has_come())
                due = stop or (args.save_steps and len(state.losses) % args.save_steps == 0)
                if due and state.losses[-1].isfinite():  # a NaN ends the run in the next step
                    run.save_checkpoint(state)
                    if stop:
                        progress.bar.close()
                        raise run.stopped(interrupt)
            last_rate = schedule.rate(epoch * steps - 1, state.restarts)
            trained = progress.summary(state.losses, last_rate)
        scores, val_loss = evaluator.score(state.scored, val, cached=cached)
        state.finish_epoch(trained, scores, val_loss, retention.measure(state.scored, processes))
        guard.after_epoch(state, scores)
        table.add_epoch()
        run.save_epoch(state, args.freq)
        if processes.any(interrupt.has_come()):
            raise run.stopped(interrupt)
    interrupt.release()
    if processes.is_rank_0:
        phases.finish(args, run, sets, state, loader, val=val, retention=retention, cached=cached)


if __name__ == "__main__":
    run_script(main)
