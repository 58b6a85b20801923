"""Training steps of ours, open_clip and transformers, taking turns on the same batches.

    python tests/benchmarks/train_step.py --data flickr8k

One step is forward, loss, backward and AdamW, the same AdamW for all, on the same weights (random,
of a published architecture) and real images and captions. First the loss and every gradient are
checked to be the same. The peers: open_clip as it trains, texts padded to 77 tokens; open_clip with
texts cut at the batch's longest; transformers, which pads to that. For `--model chinese-clip`, on
Chinese captions and without dropout: cn_clip, texts padded to 52 tokens, and transformers.

GFLOP/s are of the work that the result cannot do without (see `training.step_flops`), beside a
matrix product measured in turn with the steps.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import torch
from measure import alternate, describe_cpu, matmul, print_table, times_as_fast
from peers import open_clip_model, transformers_model
from torch import Tensor, nn
from training import (
    CHINESE,
    VIT_MODELS,
    Loss,
    adamw,
    check_agreement,
    chinese_models,
    chinese_transformers_loss,
    cn_clip_loss,
    open_clip_cut_loss,
    open_clip_loss,
    our_loss,
    real_batches,
    step_flops,
    train,
    transformers_loss,
)

from models import CLIP, build_model
from models.host import run_script

MATMUL = "matrix product"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", choices=[*VIT_MODELS, *CHINESE], default="ViT-B/32",
        help="default: %(default)s")  # fmt: skip
    add("--layers", type=int, help="of both towers, for a quick check (default: the model's)")
    add("--batch_size", type=int, nargs="+", default=[32, 128], help="default: 32 128")
    add("--rounds", type=int, default=5, help="steps of each that count (default: %(default)s)")
    add("--side", type=int, default=2048, help="of the multiplied matrices (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add("--amp", action="store_true", help="bfloat16 autocast for all, instead of float32")
    args = parser.parse_args()

    device = torch.device(args.device)
    contestants = (chinese_contestants if args.model in CHINESE else clip_contestants)(args)
    ours, _ = contestants["ours"]
    for model, _ in contestants.values():
        model.to(device).train()
    images, tokens = next(batches_for(ours, args.data, 16, 1))
    check_agreement(ours, dict(list(contestants.items())[1:]), images, tokens)
    print(describe_cpu() if device.type == "cpu" else torch.cuda.get_device_name(device))
    for batch_size in args.batch_size:
        time_steps(contestants, batch_size, args)


def clip_contestants(args: argparse.Namespace) -> dict[str, tuple[nn.Module, Loss]]:
    theirs = open_clip_model(args.model, args.layers, args.layers)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    return {
        "ours": (build_model(weights), our_loss),
        "open_clip": (theirs, open_clip_loss),
        "open_clip, text cut": (theirs, open_clip_cut_loss),
        "transformers": (transformers_model(weights), transformers_loss),
    }


def chinese_contestants(args: argparse.Namespace) -> dict[str, tuple[nn.Module, Loss]]:
    config = CHINESE[args.model]
    if args.layers:
        config = replace(config, vision_layers=args.layers, transformer_layers=args.layers)
    ours, theirs, hugging_face = chinese_models(config)
    return {
        "ours": (ours, our_loss),
        "cn_clip": (theirs, cn_clip_loss),
        "transformers": (hugging_face, chinese_transformers_loss),
    }


def batches_for(
    ours: CLIP, data: str, batch_size: int, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    chinese = ours if ours.config.text_tower == "bert" else None
    side = ours.config.image_resolution
    return real_batches(data, side, batch_size, count, ours.device, chinese)


def time_steps(
    contestants: dict[str, tuple[nn.Module, Loss]], batch_size: int, args: argparse.Namespace
) -> None:
    ours, _ = contestants["ours"]
    device = ours.device
    dtype = torch.bfloat16 if args.amp else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    optimizers = {model: adamw(model) for model, _ in contestants.values()}
    flops = []

    def step(name: str):
        model, loss = contestants[name]
        return lambda batch: train(model, loss, optimizers[model], *batch, autocast)

    def batches():
        for images, tokens in batches_for(ours, args.data, batch_size, args.rounds + 1):
            flops.append(step_flops(ours.config, tokens))
            yield images, tokens

    runs = {name: step(name) for name in contestants} | {MATMUL: matmul(args.side, dtype, device)}
    seconds = alternate(
        runs, batches(), torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    matmul_rate = 2 * args.side**3 / median(seconds.pop(MATMUL))
    rows = []
    for name, values in seconds.items():
        rate = median(work / value for work, value in zip(flops[1:], values, strict=True))
        rows.append(
            [
                name,
                f"{batch_size / median(values):.2f}",
                f"{median(values):.3f}",
                f"{rate / 1e9:.1f}",
                f"{rate / matmul_rate:.0%}",
                times_as_fast(seconds["ours"], values),
            ]
        )
    kind = str(dtype).removeprefix("torch.")
    print(
        f"\n{median(flops) / 1e9:.0f} GFLOP a step; a {args.side}-cube {kind} matrix product: "
        f"{matmul_rate / 1e9:.1f} GFLOP/s\n"
    )
    title = f"{args.model}, batch {batch_size}, {kind}, {device}"
    print_table(
        [title, "images/s", "s/step", "GFLOP/s", "of matrix product", "ours: times as fast"], rows
    )


if __name__ == "__main__":
    run_script(main)
