"""Features of images and texts, without a `precision` in that of the surrounding `autocast`."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.clip import CLIP
from models.device import upload
from models.progress_bar import progress_bar
from models.tokens import TokenizedTexts, first_alike, fitting
from utils.data.labelled_images import LabelledImages
from utils.flickr8k_dataloader import Flickr8kDataset
from utils.machine.memory import explained
from utils.machine.precision import Precision
from utils.machine.processes import ALONE, Processes
from utils.retrieval.store import Store

TEXT_BATCH = 256  # captions


class Features(NamedTuple):
    """Normalised float32 features of a data set: images `[n, d]`, texts `[captions, d]`."""

    images: Tensor
    texts: Tensor


@explained()
@torch.inference_mode()
def encode_set(
    model: CLIP,
    dataset: Flickr8kDataset,
    batch_size: int,
    num_workers: int,
    precision: Precision,
    processes: Processes = ALONE,
    cached: Mapping[str, Tensor] | None = None,
) -> Features:
    """Features of all images and captions, on the model's device. Those `cached` (see
    `cache_features`), by tower (`"image"`, `"text"`), are not computed again."""
    found = {}
    with precision.autocast():
        for tower in ("image", "text"):
            if cached and tower in cached:
                found[tower] = projected(model, tower, cached[tower])
            elif tower == "image":
                found[tower] = encode_images(model, dataset, batch_size, num_workers, processes)
            else:
                found[tower] = encode_texts(model, dataset.tokens, processes)
    return Features(found["image"], found["text"])


@torch.inference_mode()
def encode_images(
    model: CLIP,
    dataset: Flickr8kDataset | LabelledImages,
    batch_size: int,
    num_workers: int,
    processes: Processes = ALONE,
    *,
    cache: bool = False,
) -> Tensor:
    """Normalised float32 features `[n, d]` of all images, on the model's device; with `cache`, what
    `projected` makes them of. The processes share the work, and each returns all. An unreadable
    labelled image has zeros; a captioned one raises `InputError`."""
    model.eval()
    encode, d = _encoder(model, "image", cache)
    features = torch.zeros(len(dataset), d, device=model.device)
    own = _own_batches(len(dataset), batch_size, processes)
    batches = dataset.batches([list(rows) for rows in own], num_workers)
    with _progress_bar(own, "encoding images", "img", processes) as bar:
        for rows, images in zip(own, batches, strict=True):
            images = model.preprocess.normalize(upload(images, model.device))
            features[rows.start : rows.stop] = encode(images)
            bar.update(len(rows))
    for row in dataset.unreadable:
        features[row] = 0
    return processes.sum(features)


@torch.inference_mode()
def encode_texts(
    model: CLIP,
    tokens: Tensor | TokenizedTexts,
    processes: Processes = ALONE,
    *,
    cache: bool = False,
) -> Tensor:
    """Normalised float32 features `[n, d]` of `tokens` `[n, <=context_length]`, on the model's
    device; with `cache`, what `projected` makes them of. Processes share the work; each has all."""
    model.eval()
    encode, d = _encoder(model, "text", cache)
    features = torch.zeros(len(tokens), d, device=model.device)
    own = _own_batches(len(tokens), TEXT_BATCH, processes)
    with _progress_bar(own, "encoding captions", "caption", processes) as bar:
        for rows in own:
            features[rows.start : rows.stop] = encode(tokens[rows.start : rows.stop])
            bar.update(len(rows))
    return processes.sum(features)


def _own_batches(n: int, size: int, processes: Processes) -> list[range]:
    """The batches, of n rows in all, that this process encodes."""
    starts = range(processes.rank * size, n, processes.size * size)
    return [range(start, min(start + size, n)) for start in starts]


def projected(model: CLIP, tower: str, cached: Tensor) -> Tensor:
    """The features of a frozen tower from what is cached of it: the features, or if its last
    projection learns (`CLIP.projections`), the inputs of that."""
    projection = model.projections.get(tower)
    return cached if projection is None else F.normalize(projection(cached).float(), dim=-1)


def _encoder(model: CLIP, tower: str, cache: bool) -> tuple[Callable[[Tensor], Tensor], int]:
    """What encodes a batch of images or of token ids, and the number of channels."""
    encode = model.encode_image if tower == "image" else model.encode_text
    projection = model.projections.get(tower)
    if not cache or projection is None:
        return partial(encode, normalize=True), model.embed_dim

    def before_projection(batch: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        encode(batch)
        hook.remove()
        return inputs[0].float()

    return before_projection, next(projection.parameters()).shape[1]


def distinct(captions: list[str], model: CLIP) -> list[str]:
    """The captions without those that the model reads like an earlier one; prints how many."""
    count_cut(captions, model)
    alike = first_alike(model.tokenizer, captions, model.context_length)
    found = [caption for i, caption in enumerate(captions) if alike[i] == i]
    if left_out := len(captions) - len(found):
        print(f"{left_out} of the captions left out: the model reads them like another one")
    return found


def count_cut(captions: list[str], model: CLIP) -> None:
    """Print how many captions the model reads in part, if any."""
    tokens = TokenizedTexts(model.tokenizer, captions, model.context_length)
    if cut := int(tokens.is_cut.sum()):
        fits = fitting(model.tokenizer, model.context_length)
        print(f"{cut} of the captions cut: the model reads {fits} tokens of each; shorten them")


def cached_caption_features(
    model: CLIP, weights: Path, source: str, captions: list[str], precision: Precision
) -> Tensor:
    """Features of distinct captions, rounded to float16 and cached as those of `source`."""

    def encode(rows: list[int]) -> tuple[list[int], Tensor]:
        tokens = model.tokenize([captions[row] for row in rows], truncate=True)
        with torch.inference_mode(), precision.autocast():
            return rows, model.encode_text(tokens, normalize=True)

    store = Store("captions", model, weights, source, precision)
    _, features = store.features_of(captions, encode, TEXT_BATCH)
    return features.to(model.device).float()


def _progress_bar(batches: list[range], title: str, unit: str, processes: Processes) -> tqdm:
    total = sum(map(len, batches))
    return progress_bar(total=total, desc=title, unit=unit, disable=not processes.is_rank_0)
