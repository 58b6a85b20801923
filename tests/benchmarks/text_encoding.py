"""Encoding all validation captions with the text towers of ours, open_clip and transformers.

    python tests/benchmarks/text_encoding.py --data flickr8k

The same weights (random, of a published architecture) and captions for all; the three take turns
batch by batch. open_clip pads texts to 77 tokens; it is also measured with texts cut at the batch's
longest; transformers pads to that. The normalised features are checked to be the same.
"""

import argparse
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from measure import alternate, check, describe_cpu, print_table, times_as_fast
from peers import open_clip_model, transformers_model
from torch import Tensor
from training import VIT_MODELS, longest, open_clip_cut_text

from models import build_model
from models.errors import run_script
from utils import Flickr8kDataset

TOLERANCE = 1e-5


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--model", choices=VIT_MODELS, default="ViT-B/32", help="default: %(default)s")
    add("--layers", type=int, help="of the text tower, for a quick check (default: the model's)")
    add("--batch_size", type=int, default=256, help="captions at a time (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    args = parser.parse_args()

    theirs = open_clip_model(args.model, 1, args.layers)
    weights = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    ours, hugging_face = build_model(weights), transformers_model(weights)
    for model in (ours, theirs, hugging_face):
        model.to(args.device).eval()

    def transformers_encode(tokens: Tensor) -> Tensor:
        tokens = tokens[:, : longest(tokens)]
        mask = torch.arange(tokens.shape[1]) <= tokens.argmax(dim=1)[:, None]
        ids, mask = (t.to(args.device).long() for t in (tokens, mask))
        output = hugging_face.text_model(input_ids=ids, attention_mask=mask)
        return hugging_face.text_projection(output.pooler_output)

    encoders = {
        "ours": ours.encode_text,
        "open_clip": lambda tokens: theirs.encode_text(tokens.to(args.device).long()),
        "open_clip, text cut": partial(open_clip_cut_text, theirs),
        "transformers": transformers_encode,
    }
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}

    def encode(name: str):
        return lambda tokens: features[name].append(F.normalize(encoders[name](tokens), dim=-1))

    tokens = Flickr8kDataset(args.data, is_train=False).tokens
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


if __name__ == "__main__":
    run_script(main)
