"""A cache of features on disk, so that the same weights encode an image or a caption once.

A store is a folder in `RUN/features/`, or in `features/` beside a weights file; it may be deleted.
Each of its files holds `features`, float16 `[n, d]`, normalised, and `about`, JSON with their
`keys` and a digest of what they were made with. New features come in a file of their own; all
files become one when there are `MOST_FILES`, or one of them is damaged or of other weights, or half
of the features are of no use any more.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError
from models.progress_bar import progress_bar
from models.run_files import run_folder
from models.weights.interface import save_safetensors
from utils.machine.precision import Precision
from utils.runs.files import atomic_write, writing

FORMAT = 3  # raise it when the same weights and inputs give other features
FILES = "*.safetensors"
MOST_FILES = 10
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
        error. Raises `InputError` for NaN and infinity."""
        files, cached, parts = self._read()
        if cached == keys:
            return list(range(len(keys))), _joined(parts)
        row_of = {key: row for row, key in enumerate(cached)}
        missing = [i for i, key in enumerate(keys) if key not in row_of]
        new: list[tuple[list[str], Tensor]] = []
        unit = self.kind.removesuffix("s")
        try:
            with progress_bar(total=len(missing), desc=f"encoding {self.kind}", unit=unit) as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    done, features = encode(batch)
                    if not features.isfinite().all():
                        raise InputError("the features of this model are not finite: take others")
                    new.append(([keys[i] for i in done], features.half().cpu()))
                    bar.update(len(batch))
        finally:
            encoded = [key for names, _ in new for key in names]
            row_of |= {key: row for row, key in enumerate(encoded, len(cached))}
            found = [i for i, key in enumerate(keys) if key in row_of]
            rows = [row_of[keys[i]] for i in found]
            parts.append(torch.cat([parts[0], *(features for _, features in new)]))
            features = _joined(parts)
            is_stale = 2 * len(rows) <= len(features) or len(parts) - 2 < len(files)
            if rows != list(range(len(features))):
                features = features[rows]
            if rows and (is_stale or (encoded and len(files) >= MOST_FILES)):
                parts.clear()  # Windows removes no file that is mapped into memory
                self._save([keys[i] for i in found], features, instead_of=files)
            elif encoded:
                self._save(encoded, parts[-1])
        return found, features

    def _read(self) -> tuple[list[Path], list[str], list[Tensor]]:
        """All files, the keys in those that are whole and of the same weights, and no features and
        then those of each such file, mapped into memory."""
        files, keys = sorted(self.folder.glob(FILES)), []
        parts = [torch.empty(0, self.d, dtype=torch.float16)]
        for file in files:
            with suppress(Exception):  # a damaged file can break its reader in any way
                tensors = load_file(file)
                about = json.loads(tensors["about"].numpy().tobytes())
                names, features = about["keys"], tensors["features"]
                if about["made_with"] == self.made_with and len(names) == len(features):
                    keys += names
                    parts.append(features)
        return files, keys, parts

    def _save(self, keys: list[str], features: Tensor, instead_of: Sequence[Path] = ()) -> None:
        """Write a file, and remove others. A full disk or a read-only folder ends no search."""
        about = json.dumps({"made_with": self.made_with, "keys": keys}).encode()
        about = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        file = self.folder / f"{time.time_ns():020}.safetensors"
        try:
            with writing(file), atomic_write(file) as temporary:
                content = {"features": features, "about": about}
                save_safetensors(content, temporary, torch.float16)
            print(f"features of {len(keys):,} {self.kind} are cached in {self.folder}")
        except (InputError, SafetensorError) as error:
            print(f"warning: features are not cached: {error.__cause__ or error}")
            return
        for other in instead_of:
            with suppress(OSError):  # another program reads it
                other.unlink()


def _joined(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, without a copy of the only one."""
    filled = [part for part in parts if len(part)]
    return filled[0] if len(filled) == 1 else torch.cat(parts)


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
