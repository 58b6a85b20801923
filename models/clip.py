"""CLIP: an image tower and a text tower that meet in one space (Radford et al. 2021)."""

import math
from collections.abc import Collection
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import InputError
from models.resnet import ModifiedResNet
from models.transformer import Layout, Transformer
from models.vit import VisionTransformer

MAX_LOGIT_SCALE = math.log(100)
HEAD_WIDTH = 64  # of every attention head in the published models
MOST_BLOCKS = 500  # of a tower; the largest published model has 36 in a row
SHOWN = 3  # keys that an error message shows


class CLIP(nn.Module):
    """The two towers joined. `vision_layers` is a number for a ViT, four numbers for a ResNet."""

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        vision_layers: int | tuple[int, int, int, int],
        vision_width: int,
        vision_patch_size: int | None,
        context_length: int,
        vocab_size: int,
        transformer_width: int,
        transformer_heads: int,
        transformer_layers: int,
    ):
        super().__init__()
        self.context_length = context_length
        if isinstance(vision_layers, int):
            heads = vision_width // HEAD_WIDTH
            self.visual = VisionTransformer(
                image_resolution, vision_patch_size, vision_width, vision_layers, heads, embed_dim
            )
        else:
            heads = vision_width * 32 // HEAD_WIDTH
            self.visual = ModifiedResNet(
                vision_layers, embed_dim, heads, image_resolution, vision_width
            )
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        # Not nn.Embedding(...): drawing initial values on the meta device loads torch's compiler.
        table = torch.empty(vocab_size, transformer_width)
        self.token_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.empty(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def embed_dim(self) -> int:
        return self.text_projection.shape[1]

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images `[n, 3, r, r]` -> features `[n, d]`, not normalised."""
        side = self.visual.input_resolution
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            given = list(images.shape)
            raise InputError(f"images have shape {given}; this model takes [n, 3, {side}, {side}]")
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids `[n, <=context_length]` as `tokenize` makes them -> features `[n, d]`, not
        normalised.

        A text is read at its end-of-text token, the largest id in its row. Attention is causal, so
        nothing after that token can change the feature: those places are left out. With `tokens` on
        the CPU nothing waits for a GPU.
        """
        if tokens.shape[1] > self.context_length:
            raise InputError(
                f"texts of {tokens.shape[1]} tokens; this model reads {self.context_length}"
            )
        ends = tokens.argmax(dim=1)
        length = int(ends.max()) + 1
        positions = torch.arange(length, device=tokens.device)
        cells = (positions <= ends[:, None]).flatten().nonzero().flatten()
        ids = tokens[:, :length].flatten()[cells]
        read = (ends + 1).cumsum(0) - 1
        if tokens.device.type == "cpu" and self.device.type == "cuda":
            ids, cells, read = (t.pin_memory() for t in (ids, cells, read))
        ids, cells, read = (t.to(self.device, non_blocking=True) for t in (ids, cells, read))

        # Not by indexing, whose gradient adds up in an order that differs from run to run.
        x = self.token_embedding(ids) + F.embedding(cells % length, self.positional_embedding)
        x = self.transformer(x, Layout(length, read, cells, causal=True))
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosine similarities, `logits_per_image` `[n, m]` and its transpose
        `logits_per_text` `[m, n]`."""
        image_features = F.normalize(self.encode_image(images), dim=-1)
        text_features = F.normalize(self.encode_text(tokens), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep logits from being scaled by more than 100 (Radford et al. 2021, section 2.5)."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def enable_grad_checkpointing(self) -> None:
        """Keep fewer activations for the gradient: transformers compute theirs a second time."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = True

    def compile_towers(self) -> None:
        """Have `torch.compile` fuse what the towers do; the text's length varies by batch."""
        self.visual.compile()
        self.transformer.compile(dynamic=True)

    def initialize(self) -> "CLIP":
        """Random weights for training from scratch."""
        self.visual.initialize()
        self.transformer.initialize()
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.text_projection.shape[0] ** -0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        return self


def build_model(state_dict: dict[str, Tensor], input_shape: int | None = None) -> CLIP:
    """A float32 CLIP in evaluation mode with these weights; every size follows from their shapes.

    With `input_shape` the vision tower's positional embedding is interpolated to that resolution.
    Raises `InputError` for weights that are not finite, or that lists unknown, missing and wrongly
    shaped keys.
    """
    architecture = infer_architecture(state_dict)
    weights = {key: t.float() if t.is_floating_point() else t for key, t in state_dict.items()}
    with torch.device("meta"):  # shapes only: no time is spent on initial values
        model = CLIP(**architecture)
    check_keys(weights, model.state_dict())
    check_finite(weights)
    if input_shape is not None and input_shape != architecture["image_resolution"]:
        weights = resize_positional_embedding(weights, architecture, input_shape)
        with torch.device("meta"):
            model = CLIP(**architecture | {"image_resolution": input_shape})
    model.load_state_dict(weights, assign=True)
    return model.eval()


def infer_architecture(state_dict: dict[str, Tensor]) -> dict:
    """The arguments of `CLIP` that these weights were made with."""
    try:
        text_width = state_dict["ln_final.weight"].shape[0]
        sizes = {
            "embed_dim": state_dict["text_projection"].shape[1],
            "context_length": state_dict["positional_embedding"].shape[0],
            "vocab_size": state_dict["token_embedding.weight"].shape[0],
            "transformer_width": text_width,
            "transformer_heads": text_width // HEAD_WIDTH,
            "transformer_layers": count_blocks(state_dict, "transformer.resblocks"),
        }
        if any(key.startswith("visual.layer1.") for key in state_dict):
            places = state_dict["visual.attnpool.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": tuple(
                    count_blocks(state_dict, f"visual.layer{stage}") for stage in (1, 2, 3, 4)
                ),
                "vision_width": state_dict["visual.layer1.0.conv1.weight"].shape[0],
                "vision_patch_size": None,
                "image_resolution": math.isqrt(places) * 32,
            }
        else:
            width, _, patch_size, _ = state_dict["visual.conv1.weight"].shape
            places = state_dict["visual.positional_embedding"].shape[0] - 1
            vision = {
                "vision_layers": count_blocks(state_dict, "visual.transformer.resblocks"),
                "vision_width": width,
                "vision_patch_size": patch_size,
                "image_resolution": math.isqrt(places) * patch_size,
            }
    except KeyError as error:
        raise InputError(_not_clip(f"{error} is missing", state_dict)) from None
    except (IndexError, ValueError):
        raise InputError(_not_clip("shapes differ", state_dict)) from None
    if math.isqrt(places) ** 2 != places:
        raise InputError(_not_clip(f"{places} places of an image are no square", state_dict))
    check_sizes(sizes | vision, state_dict)
    return sizes | vision


def check_sizes(architecture: dict, state_dict: dict[str, Tensor]) -> None:
    """Raise `InputError` for sizes that no model has, before one is built of them."""
    for name, value in architecture.items():
        for size in value if isinstance(value, tuple) else (value,):
            if size == 0 or ("layers" in name and size > MOST_BLOCKS):
                raise InputError(_not_clip(f"its {name} would be {value}", state_dict))
    is_vit = architecture["vision_patch_size"] is not None
    for name in ("transformer_width", "vision_width") if is_vit else ("transformer_width",):
        if architecture[name] % HEAD_WIDTH:
            reason = f"its {name} {architecture[name]} is no multiple of {HEAD_WIDTH}, a head's"
            raise InputError(_not_clip(reason, state_dict))


def _not_clip(reason: str, state_dict: dict[str, Tensor]) -> str:
    towers = {
        "image": any(key.startswith("visual.") for key in state_dict),
        "text": any(key.startswith("transformer.") for key in state_dict),
    }
    if sum(towers.values()) == 1:
        missing = next(tower for tower, is_there in towers.items() if not is_there)
        return f"half a CLIP model: the {missing} tower is missing; give the weights of both"
    return (
        f"these are not the weights of a CLIP model: {reason} (its keys: {_shown(state_dict)}); "
        "give weights with the published names, as open_clip saves them"
    )


def _shown(names: Collection[str]) -> str:
    """The first of many names, in one line of bearable length."""
    some = [name if name.isprintable() else repr(name) for name in islice(names, SHOWN)]
    listed = ", ".join(name if len(name) <= 90 else f"{name[:90]}..." for name in some)
    more = len(names) - len(some)
    return f"{listed} and {more:,} more" if more else listed or "none"


def count_blocks(state_dict: dict[str, Tensor], prefix: str) -> int:
    """How many numbered modules stand under `prefix`."""
    depth = prefix.count(".") + 1
    return len({key.split(".")[depth] for key in state_dict if key.startswith(prefix + ".")})


def check_keys(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise one `InputError` for all keys that are unknown, missing or of another shape or type."""
    for key in expected.keys() - weights.keys():
        if key.endswith("num_batches_tracked"):  # a counter, which some files leave out
            weights[key] = torch.zeros((), dtype=torch.long)
    common = [key for key in expected if key in weights]
    problems = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "wrongly shaped": [
            f"{key} {list(weights[key].shape)} instead of {list(expected[key].shape)}"
            for key in common
            if weights[key].shape != expected[key].shape
        ],
        "of another type": [
            f"{key} {weights[key].dtype} instead of {expected[key].dtype}"
            for key in common
            if expected[key].is_floating_point() and not weights[key].is_floating_point()
        ],
    }
    found = [f"{kind}: {_shown(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"the weights do not fit a CLIP model; {'; '.join(found)}; download or save them anew"
        )


def check_finite(weights: dict[str, Tensor]) -> None:
    """Raise one `InputError` for all tensors that hold NaN or infinity."""
    spoilt = [
        key
        for key, tensor in weights.items()
        # A sum takes no memory, and is finite only if all its terms are.
        if tensor.is_floating_point()
        and not tensor.sum().isfinite()
        and not tensor.isfinite().all()
    ]
    if spoilt:
        raise InputError(
            f"NaN or infinity in the weights, so that every result would be NaN: {_shown(spoilt)}; "
            "take weights from before the training went wrong"
        )


def check_resolution(architecture: dict, input_shape: int) -> int:
    """Raise `InputError` for a resolution that the vision tower's cells do not divide; return the
    side of a cell in pixels: a patch, or 32, since a ResNet halves its input five times."""
    cell = architecture["vision_patch_size"] or 32
    if input_shape < cell or input_shape % cell:
        nearest = max(1, round(input_shape / cell)) * cell
        raise InputError(
            f"--input_shape {input_shape} is not a multiple of {cell}, as this model needs it; "
            f"the nearest that is: {nearest}"
        )
    return cell


def resize_positional_embedding(
    weights: dict[str, Tensor], architecture: dict, input_shape: int
) -> dict[str, Tensor]:
    """The weights for images of side `input_shape`: the grid part of the vision tower's positional
    embedding, bicubically interpolated (Dosovitskiy et al. 2021, section 3.2)."""
    cell = check_resolution(architecture, input_shape)
    is_vit = architecture["vision_patch_size"] is not None
    key = "visual.positional_embedding" if is_vit else "visual.attnpool.positional_embedding"
    first, grid = weights[key][:1], weights[key][1:]
    old, new = architecture["image_resolution"] // cell, input_shape // cell
    grid = grid.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return weights | {key: torch.cat([first, grid.flatten(2)[0].T])}
