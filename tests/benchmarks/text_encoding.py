"""Encoding all validation captions with the text towers of ours, open_clip and transformers.

    python tests/benchmarks/text_encoding.py --data flickr8k

The same weights (random, of a published architecture) and captions for all; the three take turns
batch by batch. open_clip pads texts to 77 tokens; it is also measured with texts cut at the batch's
longest; transformers pads to that. For `--model chinese-clip`, on the Chinese captions: cn_clip,
which pads to 52 tokens, and transformers. The normalised features are checked to be the same.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from measure import alternate, check, describe_cpu, print_table, times_as_fast
from peers import open_clip_model, transformers_model
from torch import Tensor
from training import (
    CHINESE,
    VIT_MODELS,
    chinese_models,
    lengths_of_chinese,
    longest,
    open_clip_cut_text,
)

from models import CLIP, build_model
from models.host import run_script
from utils import Flickr8kDataset

TOLERANCE = 1e-5
Encode = Callable[[Tensor], Tensor]  # token ids to features


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", choices=[*VIT_MODELS, *CHINESE], default="ViT-B/32",
        help="default: %(default)s")  # fmt: skip
    add("--layers", type=int, help="of the text tower, for a quick check (default: the model's)")
    add("--batch_size", type=int, default=256, help="captions at a time (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    args = parser.parse_args()

    contestants = chinese_contestants if args.model in CHINESE else clip_contestants
    ours, encoders = contestants(args)
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}

    def encode(name: str):
        return lambda tokens: features[name].append(F.normalize(encoders[name](tokens), dim=-1))

    language = "cn" if ours.config.text_tower == "bert" else "en"
    tokens = Flickr8kDataset(args.data, language=language, is_train=False, model=ours).tokens[:]
    batches = tokens.split(args.batch_size)
    seconds = alternate(
        {name: encode(name) for name in encoders},
        [batches[0], *batches],  # the first round does not count
        torch.cuda.synchronize if args.device == "cuda" else lambda: None,
    )
    for name in list(encoders)[1:]:
        differences = (torch.cat(features["ours"]) - torch.cat(features[name])).abs()
        check(f"ours and {name}: normalised features", [differences.max().item()], TOLERANCE)
    print(describe_cpu() if args.device == "cpu" else torch.cuda.get_device_name())
    title = f"{args.model}, {len(tokens)} captions, {args.device}"
    print()
    print_table(
        [title, "captions/s", "s in all", "s/batch", "ours: times as fast"],
        (
            [
                name,
                f"{len(tokens) / sum(values):.1f}",
                f"{sum(values):.2f}",
                f"{median(values):.3f}",
                times_as_fast(seconds["ours"], values),
            ]
            for name, values in seconds.items()
        ),
    )


def clip_contestants(args: argparse.Namespace) -> tuple[CLIP, dict[str, Encode]]:
    """Our model, and what encodes tokens by name: ours first, then the peers."""
    theirs = open_clip_model(args.model, 1, args.layers).to(args.device)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    ours = build_model(weights).to(args.device)
    hugging_face = transformers_model(weights).to(args.device)

    def transformers_encode(tokens: Tensor) -> Tensor:
        tokens = tokens[:, : longest(tokens)]
        mask = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=1)[:, None]
        ids, mask = (t.to(args.device).long() for t in (tokens, mask))
        output = hugging_face.text_model(input_ids=ids, attention_mask=mask)
        return hugging_face.text_projection(output.pooler_output)

    return ours, {
        "ours": ours.encode_text,
        "open_clip": lambda tokens: theirs.encode_text(tokens.to(args.device).long()),
        "open_clip, text cut": partial(open_clip_cut_text, theirs),
        "transformers": transformers_encode,
    }


def chinese_contestants(args: argparse.Namespace) -> tuple[CLIP, dict[str, Encode]]:
    """The same for a Chinese-CLIP."""
    config = replace(CHINESE[args.model], vision_layers=1)
    if args.layers:
        config = replace(config, transformer_layers=args.layers)
    ours, theirs, hugging_face = (model.to(args.device) for model in chinese_models(config))

    def transformers_encode(tokens: Tensor) -> Tensor:
        tokens = tokens[:, : int(lengths_of_chinese(tokens).max())].to(args.device)
        output = hugging_face.text_model(input_ids=tokens.long(), attention_mask=tokens.ne(0))
        return hugging_face.text_projection(output.last_hidden_state[:, 0])

    return ours, {
        "ours": ours.encode_text,
        "cn_clip": lambda tokens: theirs.encode_text(tokens.to(args.device).long()),
        "transformers": transformers_encode,
    }


if __name__ == "__main__":
    run_script(main)
