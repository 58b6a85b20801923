"""A cache of features on disk, so that the same weights encode an image or a caption once.

A store is a folder in `RUN/features/`, or in `features/` beside a weights file; it may be deleted.
`features.safetensors` holds `features`, float16 `[n, d]`, normalised, and `about`, JSON with their
`keys` and a digest of what they were made with.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import PIL
import torch
from safetensors.torch import load, save
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError
from models.files import lock
from models.progress_bar import progress_bar
from models.run_files import run_folder
from utils.machine.precision import Precision
from utils.runs.files import TEMPORARY, atomic_write, writing

FORMAT = 3  # raise it when the same weights and inputs give other features
FILE = "features.safetensors"
SAVE_EVERY = 30.0  # seconds of work that a killed program can lose
Kind = Literal["images", "captions"]
# Indices of keys -> those of them that it could encode, and their features `[n, d]`.
Encode = Callable[[list[int]], tuple[list[int], Tensor]]


class Cached(NamedTuple):
    """Keys, and their features `[n, d]`, float16 on the CPU."""

    keys: list[str]
    features: Tensor


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
        on the CPU. New ones are encoded in batches and cached, those of other keys dropped.

        Of several programs at once, one encodes and the others wait. A program that ends early, by
        Ctrl-C or an error, caches what it has. Raises `InputError` for features that are not
        finite.
        """
        cached = self._read()
        if set(cached.keys) != set(keys):
            with self._locked():  # another program may have been faster
                cached = self._complete(self._read(), keys, encode, batch_size)
        if cached.keys == keys:
            return list(range(len(keys))), cached.features
        row_of = {key: row for row, key in enumerate(cached.keys)}
        found = [i for i, key in enumerate(keys) if key in row_of]
        return found, cached.features[[row_of[keys[i]] for i in found]]

    def _complete(self, cached: Cached, keys: list[str], encode: Encode, batch_size: int) -> Cached:
        """Drop what is not in `keys`, encode what is missing, and write all features."""
        wanted, present = set(keys), set(cached.keys)
        rows = [row for row, key in enumerate(cached.keys) if key in wanted]
        names, parts = [cached.keys[row] for row in rows], [cached.features[rows]]
        missing = [i for i, key in enumerate(keys) if key not in present]
        unit = self.kind.removesuffix("s")
        saved = time.monotonic()
        try:
            with progress_bar(total=len(missing), desc=f"encoding {self.kind}", unit=unit) as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    done, features = encode(batch)
                    if not features.isfinite().all():
                        raise InputError("the features of this model are not finite: take others")
                    names += [keys[i] for i in done]
                    parts.append(features.half().cpu())
                    bar.update(len(batch))
                    if time.monotonic() - saved >= SAVE_EVERY:
                        self._save(Cached(names, torch.cat(parts)))
                        saved = time.monotonic()
        finally:
            complete = Cached(names, torch.cat(parts))
            if names != cached.keys and self._save(complete) and len(names) > len(rows):
                print(f"features of {len(names):,} {self.kind} are cached in {self.folder}")
        return complete

    def _read(self) -> Cached:
        """The cached features, unless the file is missing, damaged or made with other weights. It
        is not mapped: Windows could not replace it."""
        with suppress(Exception):  # a damaged file can break its reader in any way
            tensors = load((self.folder / FILE).read_bytes())
            about = json.loads(tensors["about"].numpy().tobytes())
            if about["made_with"] == self.made_with:
                return Cached(about["keys"], tensors["features"])
        return Cached([], torch.empty(0, self.d, dtype=torch.float16))

    def _save(self, cached: Cached) -> bool:
        """Write the store, and return whether that is done. A full disk does not end a search."""
        file = self.folder / FILE
        about = json.dumps({"made_with": self.made_with, "keys": cached.keys}).encode()
        about = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        content = save({"features": cached.features.contiguous(), "about": about})
        try:
            with writing(file), atomic_write(file) as temporary:
                temporary.write_bytes(content)
        except InputError as error:
            print(f"warning: features are not cached: {error.__cause__ or error}")
            return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other program write the store in the block, where the file system allows that."""
        waiting = f"waiting for another program that encodes the same {self.kind}"
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.folder / "lock", waiting))
                for left in self.folder.glob(f"{TEMPORARY}*"):  # by a program that was killed
                    left.unlink()
            yield


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
