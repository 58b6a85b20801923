"""Search in a folder of images: their features, and the most similar ones to a query."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models.clip import CLIP
from models.device import upload
from models.errors import InputError
from models.files import file_version
from models.preprocess import Preprocess, open_image
from utils.machine.precision import Precision
from utils.retrieval.store import Store

BATCH_SIZE = 32  # images
THREADS = 4  # decode images; a large image takes half a GB
PROBLEMS_SHOWN = 10  # unreadable images that are named
BLOCK = 2**11  # features at a time: their float32 copies fit into the CPU's cache


def image_features(
    model: CLIP, weights: Path, folder: Path, images: list[Path], precision: Precision
) -> tuple[list[Path], Tensor]:
    """The readable `images` of a folder (paths relative to it) and their normalised features `[n,
    d]`, float16 on the CPU, cached beside `weights`. Raises `InputError` if all are unreadable."""
    problems: list[str] = []

    def encode(rows: list[int]) -> tuple[list[int], Tensor]:
        paths = [folder / images[row] for row in rows]
        read = list(threads.map(partial(_read, model.preprocess), paths))
        problems.extend(problem for problem in read if isinstance(problem, str))
        done = [row for row, pixels in zip(rows, read, strict=True) if isinstance(pixels, Tensor)]
        pixels = [pixels for pixels in read if isinstance(pixels, Tensor)]
        with precision.autocast():
            return done, encode_pixels(model, pixels)

    store = Store("images", model, weights, str(folder.resolve()), precision)
    keys = [f"{file_version(folder / image)} {image.as_posix()}" for image in images]
    with ThreadPoolExecutor(THREADS) as threads:
        found, features = store.features_of(keys, encode, BATCH_SIZE)
    if not found:
        raise InputError(f"{folder}: none of its {len(images)} images can be read; {problems[0]}")
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"{problem}; passed over")
    if len(problems) > PROBLEMS_SHOWN:
        print(f"... and {len(problems) - PROBLEMS_SHOWN:,} more that cannot be read")
    return [images[i] for i in found], features


@torch.inference_mode()
def encode_pixels(model: CLIP, pixels: list[Tensor]) -> Tensor:
    """Resized and cropped images -> normalised float32 features `[n, d]` on the model's device."""
    if not pixels:
        return torch.empty(0, model.embed_dim)
    images = model.preprocess.normalize(upload(torch.stack(pixels), model.device))
    return model.encode_image(images, normalize=True)


def _read(preprocess: Preprocess, path: Path) -> Tensor | str:
    try:
        return preprocess.resize_and_crop(open_image(path))
    except InputError as error:
        return str(error)


def most_similar(features: Tensor, query: Tensor, count: int) -> list[tuple[int, float]]:
    """(index, cosine) of the `count` best of float16 `features` `[n, d]` for `query`, in order."""
    query = query.cpu()
    # Not a matrix product: it rounds equal features alike, which a BLAS does not promise.
    products = (block.float().mul_(query) for block in features.split(BLOCK))
    similarity = torch.cat([block.sum(dim=1) for block in products])
    best = similarity.topk(min(count, len(features)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
