"""Weights with the description of their model, from a file or a folder of any usual format."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from models.config import CHINESE_VOCABULARY, VOCABULARY, Config
from models.errors import InputError, one_line
from models.files import read_bytes
from models.lora import merged
from models.weights import chinese_clip, open_clip, transformers
from models.weights.architecture import infer_config
from models.weights.read import is_torchscript, read_file, read_state_dict

TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = {"vocab.json": (), "tokenizer.json": ("model", "vocab")}  # where the tokens are in it
ADAPTER_FILE = "adapter_config.json"  # of the library peft
LONG_CLIP_KEPT = 20  # positions that Long-CLIP (Zhang et al. 2024, section 3.1) keeps as they were
UNTOLD = (
    "a state dict does not tell its activation; put the description of the model beside it "
    f"({open_clip.CONFIG_FILE}), or give --activation: quick_gelu for weights of OpenAI, MetaCLIP "
    "and DFN, what was tuned from them, and runs of this program before it wrote descriptions; "
    "gelu for those of LAION, DataComp and most others"
)


def read_weights(path: Path, activation: str | None = None) -> tuple[dict[str, Tensor], Config]:
    """The weights at `path` with our keys, and the description of their model.

    A folder holds open_clip_config.json or transformers' config.json, and beside it the weights, in
    one file or, in transformers' format, in several; or it holds a file of cn_clip, or an adapter
    of the library peft, which merges it. The description of a file is in it (in a checkpoint of
    train.py, or in the metadata of safetensors that convert.py wrote) or lies beside it; published
    TorchScript archives and cn_clip's need none.
    `activation` (gelu or quick_gelu) is for a state dict without description, since it cannot be
    told by weights. Raises `InputError` for what is missing, damaged or of another kind of model;
    the caller names `path`.
    """
    if (path / ADAPTER_FILE).exists():
        return _with_adapter(path)
    folder = path if path.is_dir() else path.parent
    weights, own = (_read_folder(path), None) if path.is_dir() else read_file(path)
    weights = merged(chinese_clip.without_pooler(weights))
    library = chinese_clip if chinese_clip.is_transformers(weights) else transformers
    if library.is_transformers(weights):
        config = _config_of_transformers(folder, library)
        weights = library.from_transformers(weights)
    elif own is not None:
        config = open_clip.from_open_clip(own)
    elif path.is_file() and is_torchscript(path):
        config = infer_config(weights)
    else:
        config = _config_of_open_clip(folder)
    weights = _whole_positions(weights)
    if config is None:
        config = infer_config(weights)
        if activation is None and not chinese_clip.is_of_authors(config):
            raise InputError(UNTOLD)
        config = replace(config, activation=activation or config.activation)
    _check_vocabulary(path, config)
    return weights, config


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """The weights in the first file of a usual name, or in all that an index lists."""
    names = (*open_clip.WEIGHTS_FILES, *TRANSFORMERS_WEIGHTS)
    for name in names:
        if (folder / name).exists():
            with _named(name):
                return read_state_dict(folder / name)
        index = _json(folder / f"{name}.index.json")
        if index is not None:
            with _named(f"{name}.index.json"):
                return _read_shards(folder, index)
    for file in sorted(folder.glob(chinese_clip.WEIGHTS_FILES)):
        with _named(file.name):
            return read_state_dict(file)
    known = ", ".join((*names, chinese_clip.WEIGHTS_FILES))
    raise InputError(f"a folder without weights; one of these should be in it: {known}")


def _read_shards(folder: Path, index: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in the files that an index of transformers lists."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise InputError("lists no files (weight_map)")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(map(str, table.values()))):
        part = one_line(name)
        if Path(name).name != name:
            raise InputError(f"its part {part} is outside of the folder")
        if not (folder / name).is_file():
            raise InputError(f"its part {part} is missing; download it as well")
        with _named(part):
            weights |= read_state_dict(folder / name)
    return weights


def _with_adapter(folder: Path) -> tuple[dict[str, Tensor], Config]:
    """The weights of the model of transformers that an adapter of peft changes, changed by it."""
    base = (_json(folder / ADAPTER_FILE) or {}).get("base_model_name_or_path")
    whose = f"an adapter of the library peft for the model {one_line(base)}"
    try:
        from peft import PeftModel
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise InputError(
            f"{whose}, which that library merges ({one_line(error)}): pip install peft transformers"
        ) from None
    with TemporaryDirectory() as merged:
        try:
            model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
            model.merge_and_unload().save_pretrained(merged)
            AutoImageProcessor.from_pretrained(base).save_pretrained(merged)
        except Exception as error:  # of any library below
            raise InputError(
                f"{whose}, which cannot be merged; give a merged folder "
                f"(merge_and_unload().save_pretrained(FOLDER)) ({one_line(error)})"
            ) from None
        return read_weights(Path(merged))


def _config_of_open_clip(folder: Path) -> Config | None:
    content = _json(folder / open_clip.CONFIG_FILE)
    if content is None:
        return None
    with _named(open_clip.CONFIG_FILE):
        return open_clip.from_open_clip(content)


def _config_of_transformers(folder: Path, library: ModuleType) -> Config | None:
    content = _json(folder / transformers.CONFIG_FILE)
    if content is None:
        return None
    with _named(transformers.CONFIG_FILE):
        library.config_from_transformers(content, {})  # raises here what is wrong in this file
    processor = _json(folder / transformers.PROCESSOR_FILE) or {}
    if "image_processor" in processor:
        name, preprocessor = transformers.PROCESSOR_FILE, processor["image_processor"]
    else:
        name = transformers.PREPROCESSOR_FILE
        preprocessor = _json(folder / name) or {}
    with _named(name):
        return library.config_from_transformers(content, preprocessor)


def _whole_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of Long-CLIP's two positional embeddings of texts, the first for the positions that it keeps,
    and the second for the others, as one."""
    weights = dict(weights)
    others = weights.pop("positional_embedding_res", None)
    if others is not None and "positional_embedding" in weights:
        kept = weights["positional_embedding"][:LONG_CLIP_KEPT]
        weights["positional_embedding"] = torch.cat([kept, others[LONG_CLIP_KEPT:]])
    return weights


def _check_vocabulary(path: Path, config: Config) -> None:
    """Raise `InputError` for a model whose tokens are not those that the tokenizer here makes."""
    if config.has_bert:
        whose, known = "BERT's Chinese", CHINESE_VOCABULARY
    else:
        whose, known = "CLIP's", VOCABULARY
    for name, keys in TOKENIZERS.items():
        tokens: Any = _json(path / name) if path.is_dir() else None
        for key in keys:
            tokens = tokens.get(key) if isinstance(tokens, dict) else None
        if isinstance(tokens, dict | list) and len(tokens) != known:
            raise InputError(
                f"{name}: has {len(tokens):,} tokens, where {whose} tokenizer, which is used here, "
                f"has {known:,}; take a model with that tokenizer"
            )
    if config.vocab_size < known:
        raise InputError(
            f"its texts are made of {config.vocab_size:,} tokens, and those of {whose} tokenizer, "
            f"which is used here, of {known:,}; take a model with that tokenizer"
        )


def _json(file: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file."""
    if not file.exists():
        return None
    with _named(file.name):
        try:
            content = json.loads(read_bytes(file))
        except (ValueError, RecursionError) as error:
            raise InputError(f"broken JSON ({one_line(error)})") from None
        if not isinstance(content, dict):
            raise InputError("should hold a description, in braces")
    return content


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Errors within are of this file in the folder, which the caller names. One that does not say
    what to do, after a semicolon, is of a damaged file."""
    try:
        yield
    except InputError as error:
        remedy = "" if ";" in str(error) else "; download it anew"
        raise InputError(f"{file}: {error}{remedy}") from None
