"""A cache of features on disk, so that the same weights encode an image or a caption once.

A store is a folder in `RUN/features/`, or in `features/` beside a weights file; it may be deleted.
`features.safetensors` holds `features`, float16 `[n, d]`, normalised, and `about`, JSON with their
`keys` and a digest of what they were made with.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import PIL
import torch
from safetensors.torch import load, save
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError
from models.progress_bar import progress_bar
from models.run_files import run_folder
from utils.machine.precision import Precision
from utils.runs.files import atomic_write, writing

FORMAT = 3  # raise it when the same weights and inputs give other features
FILE = "features.safetensors"
Kind = Literal["images", "captions"]
# Indices of keys -> those of them that it could encode, and their features `[n, d]`.
Encode = Callable[[list[int]], tuple[list[int], Tensor]]


class Store:
    """The cached features of the collection `source` of images or captions, which lie beside the
    `weights` of `model`. Each `precision` has its own, since bfloat16 rounds to 8 bits."""

    def __init__(self, kind: Kind, model: CLIP, weights: Path, source: str, precision: Precision):
        self.kind = kind
        self.d = model.embed_dim
        self.made_with = _made_with(model, kind)
        run = run_folder(weights)
        place = run / "features" if run else weights.absolute().with_name("features")
        self.folder = place / f"{kind}-{_digest(weights.name, source, str(precision))[:16]}"

    def features_of(self, keys: list[str], encode: Encode, batch_size: int) -> tuple[list, Tensor]:
        """The indices of the keys that `encode` could encode, and their features, float16 `[n, d]`
        on the CPU. New ones are encoded in batches and cached, also those before Ctrl-C or an
        error; those of other keys are dropped. Raises `InputError` for NaN and infinity."""
        cached, features = self._read()
        if cached == keys:
            return list(range(len(keys))), features
        known, encoded, parts = set(cached), list(cached), [features]
        missing = [i for i, key in enumerate(keys) if key not in known]
        unit = self.kind.removesuffix("s")
        try:
            with progress_bar(total=len(missing), desc=f"encoding {self.kind}", unit=unit) as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    done, features = encode(batch)
                    if not features.isfinite().all():
                        raise InputError("the features of this model are not finite: take others")
                    encoded += [keys[i] for i in done]
                    parts.append(features.half().cpu())
                    bar.update(len(batch))
        finally:
            row_of = {key: row for row, key in enumerate(encoded)}
            found = [i for i, key in enumerate(keys) if key in row_of]
            names = [keys[i] for i in found]
            features = torch.cat(parts)[[row_of[name] for name in names]]
            if names != cached:
                self._save(names, features)
        return found, features

    def _read(self) -> tuple[list[str], Tensor]:
        """The keys and their features, unless the file is missing, damaged or made with other
        weights. It is not mapped: Windows could not replace it."""
        with suppress(Exception):  # a damaged file can break its reader in any way
            tensors = load((self.folder / FILE).read_bytes())
            about = json.loads(tensors["about"].numpy().tobytes())
            if about["made_with"] == self.made_with:
                return about["keys"], tensors["features"]
        return [], torch.empty(0, self.d, dtype=torch.float16)

    def _save(self, keys: list[str], features: Tensor) -> None:
        """Write the store. A full disk or a read-only folder does not end a search."""
        file = self.folder / FILE
        about = json.dumps({"made_with": self.made_with, "keys": keys}).encode()
        about = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        content = save({"features": features.contiguous(), "about": about})
        try:
            with writing(file), atomic_write(file) as temporary:
                temporary.write_bytes(content)
            print(f"features of {len(keys):,} {self.kind} are cached in {self.folder}")
        except InputError as error:
            print(f"warning: features are not cached: {error.__cause__ or error}")


def _made_with(model: CLIP, kind: Kind) -> str:
    """A digest of what the features depend on besides the image or caption: the tower's weights in
    the model (their file's size and time are not certain to change), sizes and preprocessing."""
    tower = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("visual.") == (kind == "images") and not name.startswith("logit_")
    }
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(_tensor_digest, tower.values()))
    shapes = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in tower.items()]
    return _digest(FORMAT, PIL.__version__, model.config, shapes, digests)


def _tensor_digest(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(numbers.view(torch.uint8).numpy()).hexdigest()


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode(errors="surrogatepass")).hexdigest()
