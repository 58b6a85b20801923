"""Write weights in the format of another library: open_clip, transformers, or cn_clip.

python models/convert.py logs/<run>/weights/best_epoch_weights.pth my_clip --format transformers
python models/convert.py ViT-B/32 my_clip --format open_clip
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # Python looks for modules in this folder only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.clip import CLIP
from models.clip_utils import find_weights, read_model
from models.errors import InputError, run_script
from models.simple_tokenizer import END_OF_TEXT, START_OF_TEXT
from models.tokens import chinese_tokenizer, clip_tokenizer
from models.weights import chinese_clip, open_clip, transformers

HOW_TO_OPEN = {
    "open_clip": 'open_clip.create_model_and_transforms("local-dir:{}")',
    "transformers": '{1}Model.from_pretrained("{0}"), {1}Processor.from_pretrained("{0}")',
    "cn_clip": 'load_from_name("{0}/clip_cn.pt", vision_model_name=..., text_model_name=..., '
    "input_resolution=...)",
}


def write_open_clip(model: CLIP, folder: Path) -> None:
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens, in float32. Raises
    `InputError` for a Chinese-CLIP, which open_clip has not."""
    if model.config.has_bert:
        raise InputError("open_clip has no Chinese-CLIP; take --format transformers or cn_clip")
    _write_json(folder / open_clip.CONFIG_FILE, open_clip.to_open_clip(model.config))
    save_file(_contiguous(model.state_dict()), folder / open_clip.WEIGHTS_FILES[0])


def write_transformers(model: CLIP, folder: Path) -> None:
    """What `CLIPModel.from_pretrained(FOLDER)` and `CLIPProcessor.from_pretrained(FOLDER)` open, in
    float32; for a Chinese-CLIP they are `ChineseCLIPModel` and `ChineseCLIPProcessor`. Raises
    `InputError` for a model with a ResNet, which transformers has not."""
    kind = chinese_clip if model.config.has_bert else transformers
    config, preprocessor = kind.config_to_transformers(model.config)
    _write_json(folder / transformers.CONFIG_FILE, config)
    _write_json(folder / transformers.PREPROCESSOR_FILE, preprocessor)
    weights = kind.to_transformers(model.state_dict())
    save_file(_contiguous(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (_write_wordpiece if model.config.has_bert else _write_bpe)(folder, model.context_length)


def write_cn_clip(model: CLIP, folder: Path) -> None:
    """A file that cn_clip's `load_from_name` opens, in float32. Raises `InputError` for any other
    model than a Chinese-CLIP."""
    if not model.config.has_bert:
        raise InputError("cn_clip has no other models than Chinese-CLIPs; take another --format")
    torch.save({"state_dict": _contiguous(model.state_dict())}, folder / "clip_cn.pt")


def _write_bpe(folder: Path, context_length: int) -> None:
    bpe = clip_tokenizer()
    _write_json(folder / "vocab.json", bpe.encoder)
    merges = (" ".join(merge) for merge in bpe.priorities)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
               "unk_token": END_OF_TEXT}  # fmt: skip
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    _write_json(folder / "tokenizer_config.json", settings | special)
    _write_json(folder / "special_tokens_map.json", special)


def _write_wordpiece(folder: Path, context_length: int) -> None:
    vocabulary = "".join(f"{token}\n" for token in chinese_tokenizer().decoder)
    (folder / "vocab.txt").write_text(vocabulary, "utf-8", newline="\n")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": context_length}
    _write_json(folder / "tokenizer_config.json", settings)


WRITERS = {
    "open_clip": write_open_clip,
    "transformers": write_transformers,
    "cn_clip": write_cn_clip,
}


def convert(model: CLIP, output: Path, to: str) -> None:
    """Write the folder `output`, whole or not at all. Raises `InputError` if it exists already, and
    for a model that the format has not."""
    if output.exists():
        raise InputError(f"{output}: exists already; name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=".unfinished.") as staging:
        folder = Path(staging) / "folder"
        folder.mkdir()
        WRITERS[to](model, folder)
        folder.rename(output)


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in weights.items()}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights file or folder, or a model name")
    add("output", type=Path, metavar="OUT", help="folder to write; it must not exist yet")
    add("--format", choices=list(WRITERS), required=True, help="whose program is to open it")
    add("--activation", choices=["quick_gelu", "gelu"], help="of weights that do not tell it")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    model = read_model(find_weights(args.weights), args.activation)
    convert(model, args.output.expanduser(), args.format)
    kind = "ChineseCLIP" if model.config.has_bert else "CLIP"
    how = HOW_TO_OPEN[args.format].format(args.output, kind)
    print(f"written to {args.output}; open it with {how}")


if __name__ == "__main__":
    run_script(main)
