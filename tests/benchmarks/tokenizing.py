"""Token ids of all training captions by the tokenizers of ours, open_clip and transformers.

    python tests/benchmarks/tokenizing.py --data flickr8k

The three take turns. Each round starts without what a tokenizer remembers of words it has seen. The
ids are checked to be the same.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import open_clip
import torch
from measure import alternate, check, print_table, times_as_fast
from transformers import CLIPTokenizerFast

from models import tokenize
from models.host import run_script
from models.tokens import clip_tokenizer
from utils import Flickr8kDataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="flickr8k", metavar="FOLDER", help="default: %(default)s")
    add("--language", choices=["en", "cn"], default="en", help="default: %(default)s")
    add("--rounds", type=int, default=7, help="default: %(default)s")
    args = parser.parse_args()
    texts = list(Flickr8kDataset(args.data, language=args.language).text)
    ids = {}
    reference = open_clip.SimpleTokenizer()
    untouched = dict(reference.cache)

    def ours(_):
        clip_tokenizer().of_chunk.clear()
        ids["ours"] = tokenize(texts, truncate=True)

    def theirs(_):
        reference.cache = dict(untouched)
        ids["open_clip"] = reference(texts)

    def hugging_face(fast):
        padded = fast(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids["transformers"] = padded.input_ids * padded.attention_mask

    with TemporaryDirectory() as folder:
        bpe = clip_tokenizer()
        (Path(folder) / "vocab.json").write_text(json.dumps(bpe.encoder), "utf-8")
        merges = "\n".join(" ".join(merge) for merge in bpe.merges)
        (Path(folder) / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", "utf-8")
        fast = [
            CLIPTokenizerFast.from_pretrained(folder, model_max_length=77)
            for _ in range(args.rounds + 1)
        ]
    contestants = {"ours": ours, "open_clip": theirs, "transformers (Rust)": hugging_face}
    seconds = alternate(contestants, fast)
    for name in ("open_clip", "transformers"):
        check(f"ids of ours and {name}", [(ids["ours"] - ids[name]).abs().max().item()], 0)
    title = f"token ids of {len(texts)} captions, {torch.get_num_threads()} threads"
    rows = [
        [name, f"{len(texts) / median(values):,.0f}", times_as_fast(seconds["ours"], values)]
        for name, values in seconds.items()
    ]
    print_table([title, "captions/s", "ours: times as fast"], rows)


if __name__ == "__main__":
    run_script(main)
