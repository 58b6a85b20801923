"""Any model of the library open_clip (SigLIP, EVA, ...), with the interface of `CLIP`."""

import copy
import json
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip import CLIP, compile_for_training
from models.clip_text import TextTower
from models.config import CHOICES, CONTEXT_LENGTH
from models.errors import InputError, one_line, quoted
from models.hf_tokenizer import HFTokenizer, hf_tokenizer
from models.preprocess import Preprocess
from models.tokens import Tokenizer, clip_tokenizer

# Attributes of modules that are probabilities of dropping something at random.
RANDOM = ("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop",
          "prob")  # fmt: skip
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class OpenClipConfig:
    """The description of a model that open_clip builds.

    content  that of an open_clip_config.json; its model has `custom_text`, a text tower apart
    folder   where the tokenizer's files may lie
    """

    content: dict[str, Any]
    folder: Path | None = field(default=None, repr=False, compare=False)
    last_width: int = 0  # of the image tower, known once the model is built
    transformer_width: int = 0

    @property
    def model(self) -> dict[str, Any]:
        return self.content["model_cfg"]


def open_clip_config(content: dict[str, Any], folder: Path, reason: str) -> OpenClipConfig:
    """The description of a model that open_clip builds, for the `reason` that our towers do not
    serve. Raises `InputError` if open_clip is missing, and for models of other kinds."""
    content = copy.deepcopy(content if "model_cfg" in content else {"model_cfg": content})
    model = content["model_cfg"]
    if find_spec("open_clip") is None:
        raise InputError(f"{reason}, which the library open_clip has: pip install open_clip_torch")
    if "multimodal_cfg" in model:
        raise InputError(f"{reason}: a CoCa, which also writes captions; take another model")
    model["custom_text"] = True
    # All weights come from the file; none are downloaded for a tower alone.
    model["vision_cfg"]["timm_model_pretrained"] = False
    model["text_cfg"]["hf_model_pretrained"] = False
    preprocess(content, side=1)  # errors are raised here, before weights are downloaded
    return OpenClipConfig(content, folder)


class OpenClipModel(CLIP):
    """The towers `visual` and `text` as open_clip builds them, `logit_scale`, and in a SigLIP
    `logit_bias`; the keys of the weights are open_clip's.

    Nothing is dropped at random in training: with dropout, gradient caching and resumed runs would
    not be exact. Raises `InputError` if open_clip cannot build the model.
    """

    def __init__(self, config: OpenClipConfig):
        nn.Module.__init__(self)
        built = _build(config.model)
        self.visual, self.text = built.visual, built.text
        self.logit_scale, self.logit_bias = built.logit_scale, built.logit_bias
        self.visual.input_resolution = square_side(self.visual.image_size)
        trunk = getattr(self.visual, "trunk", None)
        # The last stage's: a convolution behind it, as MobileCLIP has one, may be wider.
        width = trunk.feature_info[-1]["num_chs"] if trunk else self.visual.conv1.out_channels
        text = getattr(self.text, "config", None)
        self.config = replace(
            config,
            last_width=width,
            transformer_width=text.hidden_size if text else self.text.width,
        )
        for module, name in product(self.modules(), RANDOM):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

    @property
    def embed_dim(self) -> int:
        return self.config.model["embed_dim"]

    @property
    def context_length(self) -> int:
        return self.config.model["text_cfg"].get("context_length", CONTEXT_LENGTH)

    @property
    def preprocess(self) -> Preprocess:
        return preprocess(self.config.content, self.visual.input_resolution)

    @property
    def tokenizer(self) -> Tokenizer:
        text = self.config.model["text_cfg"]
        if not text.get("hf_tokenizer_name"):
            return clip_tokenizer()
        settings = json.dumps(text.get("tokenizer_kwargs") or {}, sort_keys=True)
        return hf_tokenizer(text["hf_tokenizer_name"], self.config.folder, settings)

    @property
    def text_tower(self) -> TextTower:
        """The facts on a text tower that are of use for any; its methods are not."""
        return TextTower()

    @property
    def projections(self) -> dict[str, nn.Module]:
        """The last projections of towers from timm and transformers, which are never frozen."""
        head = getattr(self.visual, "head", None)
        image = getattr(head, "proj", None) or getattr(head, "mlp", None)
        found = {"image": image, "text": getattr(self.text, "proj", None)}
        return {tower: m for tower, m in found.items() if m and list(m.parameters())}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of a tokenizer that is not CLIP's, unless `folder` has them."""
        if isinstance(self.tokenizer, HFTokenizer):
            self.tokenizer.save(folder)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        if text := getattr(self.text, "config", None):  # of transformers, which masks padding
            tokens = tokens[:, (tokens != text.pad_token_id).any(dim=0)]
        features = self.text(tokens.to(self.device, torch.int64))
        return F.normalize(features.float(), dim=-1) if normalize else features

    def enable_grad_checkpointing(self) -> None:
        for tower in (self.visual, self.text):
            tower.set_grad_checkpointing(True)

    def compile_towers(self) -> None:
        for tower in (self.visual, self.text):
            compile_for_training(tower)


def preprocess(content: dict[str, Any], side: int) -> Preprocess:
    """The preprocessing that a description has, for images of `side` pixels."""
    given = content.get("preprocess_cfg", {})
    fields = {name: given[name] for name in PREPROCESSING if given.get(name) is not None}
    for name, value in fields.items():
        fields[name] = tuple(value) if isinstance(value, list) else value
        if name in CHOICES and value not in CHOICES[name]:
            known = " and ".join(CHOICES[name])
            raise InputError(f"its {name} is {quoted(value)}; {known} work; take another model")
    return Preprocess(side, **fields)


def _build(description: dict[str, Any]) -> nn.Module:
    """open_clip's model with random weights."""
    from open_clip.model import CustomTextCLIP

    description = copy.deepcopy(description)
    del description["custom_text"]
    try:
        return CustomTextCLIP(**description)
    except Exception as error:  # of open_clip, timm or transformers
        raise InputError(f"open_clip cannot build it ({one_line(error)}); take another model, or "
                         "pip install -U open_clip_torch timm transformers") from None  # fmt: skip


def square_side(size: object) -> int:
    """The side of images in pixels, from one number or from height and width."""
    sides = size if isinstance(size, list | tuple) else [size]
    if not all(type(side) is int for side in sides) or len(set(sides)) != 1:
        raise InputError(f"it takes images of {quoted(size)} pixels; only square ones work here")
    return sides[0]
