"""ONNX files of a model, for programs without PyTorch."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.clip import CLIP
from models.config import Config
from models.errors import InputError, one_line
from models.files import write_json
from models.progress_bar import progress_bar
from models.weights.interface import Format, write_tokenizer

OPSET = 18  # the version of the ONNX operators
LARGEST_FILE = 2 * 10**9  # bytes; an ONNX file ends at 2 GiB, and larger weights lie beside it
UPGRADE = "pip install -U torch onnx onnxruntime onnxscript"
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}  # relative to the largest number


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


def write(model: CLIP, folder: Path, dtype: torch.dtype) -> None:
    """image.onnx and text.onnx; how to prepare their inputs (clip.json); and the tokenizer, which
    transformers' `CLIPTokenizer.from_pretrained(FOLDER)` opens, or `BertTokenizer`."""
    folder.mkdir()
    export_onnx(model, folder, dtype)
    write_json(folder / "clip.json", preparation(model))
    write_tokenizer(model, folder)


def check_packages(_: Path) -> None:
    """Raise `InputError` if a package that the export needs is missing or broken."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX needs other packages ({error}): pip install onnx onnxruntime onnxscript"
        ) from None


def export_onnx(model: CLIP, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `image.onnx` (`images` -> `image_features`) and `text.onnx` (`tokens` ->
    `text_features`), with weights of type `dtype`. Inputs and outputs are those of `ImageEncoder`
    and `TextEncoder`, n being any number; the product of two features is their cosine similarity.

    Raises `InputError` if onnxruntime computes other features from a file than `model`.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # no warnings of optimisations
    exported = model
    if dtype != torch.float32 or not model.config.is_vit:
        exported = copy.deepcopy(model)
        _fold_norms(exported)
        exported.to(dtype)
    images, tokens = (partial(make, model.config) for make in (_random_images, _random_tokens))
    from torch.export import Dim  # takes long to import

    # torch 2.6 does not take a number without a maximum
    n, length = Dim("n", max=2**31 - 1), Dim("length", max=model.context_length)
    towers = (
        ("image", ImageEncoder(exported), images, {0: n}, model.encode_image),
        ("text", TextEncoder(exported), tokens, {0: n, 1: length}, model.encode_text),
    )
    for name, encoder, inputs, sizes, encode in progress_bar(
        towers, desc="exporting", unit="tower"
    ):
        file = folder / f"{name}.onnx"
        with torch.no_grad():
            _export(encoder, inputs(2), sizes, file, f"{name}_features")
            _check(file, encode, [inputs(1), inputs(3)], TOLERANCES[dtype])


def _fold_norms(model: nn.Module) -> None:
    """Fuse every batch norm with the convolution before it: faster, and torch 2.6 cannot export a
    batch norm."""
    for parent in model.modules():
        for (name, module), (next_name, norm) in pairwise([*parent.named_children()]):
            if isinstance(norm, nn.BatchNorm2d):
                parent.add_module(name, fuse_conv_bn_eval(module, norm))
                parent.add_module(next_name, nn.Identity())


def _export(
    encoder: ImageEncoder, example: Tensor, sizes: dict[int, Any], file: Path, output: str
) -> None:
    try:
        program = torch.onnx.export(
            torch.export.export(encoder, (example,), dynamic_shapes=(sizes,), strict=False),
            output_names=[output],
            opset_version=OPSET,
            dynamic_shapes=(sizes,),
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(
            f"torch {torch.__version__} cannot export {file.name} with this onnxscript "
            f"({one_line(error)}): {UPGRADE}"
        ) from error
    for node in program.model.graph:
        node.metadata_props.clear()  # they hold paths of this computer
    size = sum(t.nbytes for t in encoder.state_dict().values())
    program.save(file, external_data=size > LARGEST_FILE)


def _check(
    file: Path, encode: Callable[[Tensor], Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for x in inputs:
        expected = encode(x, normalize=True)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        error = ((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            raise InputError(
                f"onnxruntime computes other features from {file.name}, by {error:.2g} of the "
                f"largest number, where {tolerance:g} is allowed: {UPGRADE}"
            )


def _random_images(config: Config, n: int) -> Tensor:
    side = config.image_resolution
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def _random_tokens(config: Config, n: int) -> Tensor:
    """Texts, each a token shorter than the one before; the rows are shorter for a larger n."""
    length, end = config.context_length // n, config.vocab_size - 1
    tokens = torch.randint(1, end, (n, length), generator=torch.Generator().manual_seed(n))
    for padding, row in enumerate(tokens):
        row[length - 1 - padding :] = 0
        row[length - 1 - padding] = end
    return tokens


def preparation(model: CLIP) -> dict[str, Any]:
    """The preprocessing of images and texts for the ONNX files, and the logit scale."""
    c, tokenizer = model.config, model.tokenizer
    return {
        "image": {"size": c.image_resolution, "mean": c.mean, "std": c.std,
                  "interpolation": c.interpolation, "resize_mode": c.resize_mode},
        "text": {"context_length": c.context_length, "start_of_text": tokenizer.start_of_text,
                 "end_of_text": tokenizer.end_of_text, "padding": 0},
        "embed_dim": c.embed_dim,
        "logit_scale": model.logit_scale.exp().item(),
    }  # fmt: skip


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
