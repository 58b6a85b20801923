"""ONNX files of a model, for programs without PyTorch."""

import copy
import logging
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.clip import CLIP
from models.errors import InputError
from models.files import write_json
from models.weights.interface import Format, write_tokenizer

OPSET = 18  # the version of the ONNX operators
LARGEST_FILE = 2 * 10**9  # bytes; an ONNX file ends at 2 GiB, and larger weights lie beside it
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class ImageEncoder(nn.Module):
    """`CLIP.encode_image` as the module that torch exports, with features of length 1."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """float32 `[n, 3, r, r]` -> float32 `[n, d]`, whatever the type of the weights."""
        return self.model.encode_image(images.to(self.model.logit_scale.dtype), normalize=True)


class TextEncoder(ImageEncoder):
    """`CLIP.encode_text` as the module that torch exports, with features of length 1."""

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 `[n, <=context_length]` -> float32 `[n, d]`, whatever the type of the weights."""
        return F.normalize(self.model.encode_text_grid(tokens).float(), dim=-1)


def check_packages() -> None:
    """Raise `InputError` if a package that writes or opens the files is missing."""
    if not all(map(find_spec, PACKAGES)):
        raise InputError(f"ONNX needs other packages: pip install {' '.join(PACKAGES)}")


def write(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """`image.onnx` (`images` -> `image_features`) and `text.onnx` (`tokens` -> `text_features`),
    with weights of type `dtype`; their inputs and outputs are those of `ImageEncoder` and
    `TextEncoder`, n being any number. How to prepare the inputs (clip.json); and the tokenizer,
    which transformers' `CLIPTokenizer.from_pretrained(FOLDER)` opens, or `BertTokenizer`."""
    from torch.export import Dim  # takes long to import

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # no warnings of optimisations
    folder.mkdir()
    exported, c, tokenizer = copy.deepcopy(model), model.config, model.tokenizer
    _fold_norms(exported)
    exported.to(dtype)
    images = torch.zeros(2, 3, c.image_resolution, c.image_resolution)
    tokens = torch.full((2, c.context_length // 2), c.vocab_size - 1)
    # torch 2.6 does not take a number without a maximum
    n, length = Dim("n", max=2**31 - 1), Dim("length", max=c.context_length)
    _export(ImageEncoder(exported), images, {0: n}, folder / "image.onnx")
    _export(TextEncoder(exported), tokens, {0: n, 1: length}, folder / "text.onnx")
    content = {
        "image": {"size": c.image_resolution, "mean": c.mean, "std": c.std,
                  "interpolation": c.interpolation, "resize_mode": c.resize_mode},
        "text": {"context_length": c.context_length, "start_of_text": tokenizer.start_of_text,
                 "end_of_text": tokenizer.end_of_text, "padding": 0},
        "embed_dim": c.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
    }  # fmt: skip
    write_json(folder / "clip.json", content)
    write_tokenizer(model, folder)


def _fold_norms(model: nn.Module) -> None:
    """Fuse every batch norm, which torch 2.6 cannot export, with the convolution before it."""
    for parent in model.modules():
        for (name, module), (next_name, norm) in pairwise([*parent.named_children()]):
            if isinstance(norm, nn.BatchNorm2d):
                parent.add_module(name, fuse_conv_bn_eval(module, norm))
                parent.add_module(next_name, nn.Identity())


@torch.no_grad()
def _export(encoder: ImageEncoder, example: Tensor, sizes: dict[int, Any], file: Path) -> None:
    program = torch.onnx.export(
        torch.export.export(encoder, (example,), dynamic_shapes=(sizes,), strict=False),
        output_names=[f"{file.stem}_features"],
        opset_version=OPSET,
        dynamic_shapes=(sizes,),
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # they hold paths of this computer
    size = sum(t.nbytes for t in encoder.state_dict().values())
    program.save(file, external_data=size > LARGEST_FILE)


FORMAT = Format(
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
    write,
    check_packages,
)
