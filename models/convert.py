"""Write weights in another format, for another program or to pass them on.

python models/convert.py logs/<run> my_clip --format transformers
python models/convert.py ViT-B/32 my_clip.safetensors --format safetensors --half
"""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

if __name__ == "__main__":  # Python looks for modules in this folder only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from models.clip import CLIP
from models.clip_utils import find_weights, read_model
from models.errors import InputError, listed, one_line
from models.files import check_writable
from models.host import run_script
from models.onnx_export import check_packages, export_onnx, preparation
from models.scripts import ArgumentParser, add_activation, path
from models.simple_tokenizer import END_OF_TEXT, START_OF_TEXT
from models.tokens import clip_tokenizer
from models.weights import chinese_clip, open_clip, transformers


def write_open_clip(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens. Raises `InputError`
    for a Chinese-CLIP, which open_clip has not."""
    if model.config.has_bert:
        raise InputError("open_clip has no Chinese-CLIP; take --format transformers or cn_clip")
    folder.mkdir()
    _write_json(folder / open_clip.CONFIG_FILE, open_clip.to_open_clip(model.config))
    write_safetensors(model, folder / open_clip.WEIGHTS_FILES[0], dtype)


def write_transformers(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """What `CLIPModel.from_pretrained(FOLDER)` and `CLIPProcessor.from_pretrained(FOLDER)` open, or
    for a Chinese-CLIP `ChineseCLIPModel` and `ChineseCLIPProcessor`. Raises `InputError` for a
    model with a ResNet, which transformers has not."""
    library = chinese_clip if model.config.has_bert else transformers
    config, preprocessor = library.config_to_transformers(model.config)
    folder.mkdir()
    dtype_name = str(dtype).removeprefix("torch.")
    _write_json(folder / transformers.CONFIG_FILE, config | {"torch_dtype": dtype_name})
    _write_json(folder / transformers.PREPROCESSOR_FILE, preprocessor)
    weights = library.to_transformers(model.state_dict())
    _save(weights, folder / "model.safetensors", dtype, {})
    _write_tokenizer(model, folder)


def write_cn_clip(model: CLIP, file: Path, dtype: torch.dtype) -> None:
    """A file that cn_clip's `load_from_name` opens. Raises `InputError` for any other model than a
    Chinese-CLIP."""
    if not model.config.has_bert:
        raise InputError("cn_clip has no other models than Chinese-CLIPs; take another --format")
    try:
        with file.open("wb") as opened:
            torch.save({"state_dict": _cast(model.state_dict(), dtype)}, opened)
    except RuntimeError as error:  # torch fails a check of its own on a full disk
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_safetensors(model: CLIP, file: Path, dtype: torch.dtype) -> None:
    """One file with our keys. In its metadata lies the description of the model, which `load` would
    otherwise look for beside the file."""
    description = json.dumps(open_clip.to_open_clip(model.config))
    _save(model.state_dict(), file, dtype, {open_clip.CONFIG_FILE: description})


def write_onnx(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """image.onnx and text.onnx; how to prepare their inputs (clip.json), and the tokenizer, which
    `CLIPTokenizer.from_pretrained(FOLDER)` opens, or `BertTokenizer` for a Chinese-CLIP."""
    folder.mkdir()
    export_onnx(model, folder, dtype)
    _write_json(folder / "clip.json", preparation(model))
    _write_tokenizer(model, folder)


class Format(NamedTuple):
    """What writes it, what it is for, and the Python that opens it, where `{0}` is its path."""

    write: Callable[[CLIP, Path, torch.dtype], None]
    purpose: str
    opened_by: str


FORMATS = {
    "open_clip": Format(
        write_open_clip,
        "a folder for the library open_clip",
        """
        import open_clip
        open_clip.create_model_and_transforms("local-dir:{0}")
        """,
    ),
    "transformers": Format(
        write_transformers,
        "a folder for the library transformers, which has no ResNets",
        """
        from transformers import {clip}Model, {clip}Processor
        {clip}Model.from_pretrained("{0}")
        {clip}Processor.from_pretrained("{0}")
        """,
    ),
    "cn_clip": Format(
        write_cn_clip,
        "a file for the authors' program, of a Chinese-CLIP",
        """
        from cn_clip.clip import load_from_name
        load_from_name("{0}", vision_model_name=..., text_model_name=..., input_resolution=...)
        """,
    ),
    "safetensors": Format(
        write_safetensors,
        "one file to keep or to pass on, which describes its model itself",
        """
        from models import load
        load("{0}")
        """,
    ),
    "onnx": Format(
        write_onnx,
        "a folder for onnxruntime: programs without PyTorch, in many languages",
        """
        # texts: a list; images: float32 [n, 3, side, side], prepared as {0}/clip.json says
        import json, onnxruntime, transformers
        tokenizer = transformers.{tokenizer}.from_pretrained("{0}")
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="np").input_ids
        image_tower = onnxruntime.InferenceSession("{0}/image.onnx")
        text_tower = onnxruntime.InferenceSession("{0}/text.onnx")
        (image_features,) = image_tower.run(None, {{"images": images}})
        (text_features,) = text_tower.run(None, {{"tokens": tokens}})
        similarities = image_features @ text_features.T  # cosines: features have length 1
        logits = similarities * json.load(open("{0}/clip.json"))["logit_scale"]
        """,
    ),
}


def convert(model: CLIP, output: Path, to: str, half: bool = False) -> None:
    """Write a float32 model to `output`, whole or not at all; with floats as float16 if `half`.

    Raises `InputError` if `output` exists, if the format has no such model, if float16 has no such
    numbers, and if the disk is full.
    """
    check_output(output, to)
    floats = {key: t for key, t in model.state_dict().items() if t.is_floating_point()}
    too_large = [key for key, t in floats.items() if half and not t.half().isfinite().all()]
    if too_large:
        raise InputError(f"float16 ends at 65,504, which {listed(too_large)} exceed; omit --half")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(
            dir=output.parent, prefix=".unfinished.", ignore_cleanup_errors=True
        ) as staging:
            written = Path(staging) / "output"
            FORMATS[to].write(model, written, torch.float16 if half else torch.float32)
            written.rename(output)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{output}: cannot be written ({one_line(error)}), and nothing of it is left; make "
            "room, or name another place"
        ) from error


def check_output(output: Path, to: str) -> None:
    """Raise `InputError` if `output` exists, cannot be written, or is no name for this format."""
    if output.exists():
        raise InputError(f"{output}: exists already; name a new file or folder")
    check_writable(output)
    if to == "safetensors" and output.suffix != ".safetensors":
        raise InputError(f"{output}: a single file; name it {output.name}.safetensors")
    if to == "onnx":
        check_packages()


def _save(
    weights: dict[str, Tensor], file: Path, dtype: torch.dtype, metadata: dict[str, str]
) -> None:
    file.touch()
    mode = file.stat().st_mode  # safetensors lets nobody but the owner read
    save_file(_cast(weights, dtype), file, metadata={"format": "pt"} | metadata)
    file.chmod(mode)


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in weights.items()
    }


def _write_tokenizer(model: CLIP, folder: Path) -> None:
    if model.config.has_bert:
        vocabulary = "".join(f"{token}\n" for token in model.tokenizer.decoder)
        (folder / "vocab.txt").write_bytes(vocabulary.encode())
        settings = {"tokenizer_class": "BertTokenizer", "model_max_length": model.context_length}
        _write_json(folder / "tokenizer_config.json", settings)
        return
    bpe = clip_tokenizer()
    _write_json(folder / "vocab.json", bpe.encoder)
    merges = (" ".join(merge) for merge in bpe.priorities)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
               "unk_token": END_OF_TEXT}  # fmt: skip
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": model.context_length}
    _write_json(folder / "tokenizer_config.json", settings | special)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def description(name: str, path: object, is_chinese: bool = False) -> str:
    """Lines on a format: what is at `path`, and what opens it in Python."""
    each = FORMATS[name]
    lines = textwrap.indent(textwrap.dedent(each.opened_by).strip(), "    ")
    clip, tokenizer = ("ChineseCLIP", "BertTokenizer") if is_chinese else ("CLIP", "CLIPTokenizer")
    return f"  {name}: {each.purpose}\n{lines.format(path, clip=clip, tokenizer=tokenizer)}"


def main() -> None:
    parser = ArgumentParser(
        description=__doc__,
        epilog="\n".join(
            ["formats, and what opens them in Python:", *(description(f, "OUT") for f in FORMATS)]
        ),
    )
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="weights file or folder, a run, or a model name")
    add("output", type=path, metavar="OUT", help="what to write; it must not exist yet")
    add("--format", choices=list(FORMATS), required=True, help="see below")
    add("--half", action="store_true", help="float16: half the size; features agree to 3 digits")
    add_activation(parser)
    args = parser.parse_args()
    check_output(args.output, args.format)
    model = read_model(find_weights(args.weights), args.activation)
    convert(model, args.output, args.format, args.half)
    opened_by = description(args.format, args.output.as_posix(), model.config.has_bert)
    print(f"written to {args.output}\n{opened_by}")


if __name__ == "__main__":
    run_script(main)
