"""Features that are kept, so that the same weights encode an image or a caption once.

A store is a folder with `features.safetensors` in it, which holds

- `features`: float16 `[n, d]`, normalised;
- `keys`: a JSON list of n texts, which say what each feature is of;
- as metadata: a digest of what the features were made with, and one of the file's content.

Features of mixed precision have stores of their own: bfloat16 rounds to 8 bits, which shows in the
third decimal of a similarity, while float16, in which all are kept, rounds to 11. Mixed precision
takes kept features of float32 as well, float32 none of mixed precision.

Stores lie in `RUN/features/`, or in `features/` beside a weights file, or, where that cannot be
written, in the user's cache folder. They may be deleted at any time.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import PIL
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from models.clip import CLIP
from models.errors import InputError
from models.files import lock
from models.progress_bar import progress_bar
from models.run_files import run_folder
from utils.machine.precision import Precision
from utils.runs.files import TEMPORARY, atomic_write, writing

FORMAT = 2  # raise it when the same weights and inputs give other features
FILE = "features.safetensors"
SAVE_EVERY = 30.0  # seconds of work, which a program that is killed can lose
Kind = Literal["images", "captions"]
# Of some of the keys, by index, those that it could encode, and their features `[n, d]`.
Encode = Callable[[list[int]], tuple[list[int], Tensor]]


class Cached(NamedTuple):
    """Keys, and their features `[n, d]`, float16 on the CPU."""

    keys: list[str]
    features: Tensor


class Store:
    """The kept features of one collection of images or captions.

    model      what encodes them
    weights    the file or folder that the model was loaded from: the store lies beside it
    source     the collection's name: each has a store of its own
    precision  in which they are encoded
    """

    def __init__(self, kind: Kind, model: CLIP, weights: Path, source: str, precision: Precision):
        self.kind = kind
        self.d = model.embed_dim
        self.made_with = _made_with(model, kind)
        names, places = [f"{kind}-{_digest(weights.name, source)[:16]}"], _places(weights)
        if precision.use_amp:
            names.append(f"{names[0]}-{precision.dtype}".replace("torch.", ""))
        self.read_from = [folder / name for name in names for folder in places]
        self.folders = [folder / names[-1] for folder in places]

    def features_of(self, keys: list[str], encode: Encode, batch_size: int) -> tuple[list, Tensor]:
        """The features of `keys`: the kept ones, and those of the others, which `encode` makes in
        batches and which are kept from now on. What is kept of other keys is dropped.

        Returns the indices of the keys that have features, all but those that `encode` leaves out,
        and the features, float16 `[n, d]` on the CPU. Several programs may do so at once: one of
        them encodes, the others wait for it. A program that ends early, by Ctrl-C or an error,
        keeps what it has. Raises `InputError` for features that are not finite.
        """
        kept, _ = self._read()
        if set(kept.keys) != set(keys):
            with self._locked() as folder:
                kept, problems = self._read()  # another program may have been faster
                for problem in problems:
                    print(f"{problem}; its features are computed anew")
                kept = self._complete(kept, keys, encode, batch_size, folder)
        if kept.keys == keys:
            return list(range(len(keys))), kept.features
        row_of = {key: row for row, key in enumerate(kept.keys)}
        found = [i for i, key in enumerate(keys) if key in row_of]
        return found, kept.features[[row_of[keys[i]] for i in found]]

    def _complete(
        self, kept: Cached, keys: list[str], encode: Encode, batch_size: int, folder: Path | None
    ) -> Cached:
        """Drop what is not among `keys`, add what is missing, and write all that to `folder`."""
        wanted, known = set(keys), set(kept.keys)
        rows = [row for row, key in enumerate(kept.keys) if key in wanted]
        names, parts = [kept.keys[row] for row in rows], [kept.features[rows]]
        missing = [i for i, key in enumerate(keys) if key not in known]
        unit = self.kind.removesuffix("s")
        saved = time.monotonic()
        try:
            with progress_bar(
                total=len(missing), desc=f"encoding {self.kind}", unit=unit, leave=False
            ) as bar:
                for start in range(0, len(missing), batch_size):
                    batch = missing[start : start + batch_size]
                    done, features = encode(batch)
                    if not features.isfinite().all():
                        raise InputError("the features of this model are not finite: take others")
                    names += [keys[i] for i in done]
                    parts.append(features.half().cpu())
                    bar.update(len(batch))
                    if time.monotonic() - saved >= SAVE_EVERY:
                        self._save(Cached(names, torch.cat(parts)), folder)
                        saved = time.monotonic()
        finally:
            complete = Cached(names, torch.cat(parts))
            is_kept = names != kept.keys and self._save(complete, folder)
            if is_kept and len(names) > len(rows):
                print(f"features of {len(names):,} {self.kind} are kept in {folder}")
        return complete

    def _read(self) -> tuple[Cached, list[str]]:
        """What is kept in all places, and what is wrong with stores that cannot be used."""
        everything, problems = Cached([], torch.empty(0, self.d, dtype=torch.float16)), []
        for folder in self.read_from:
            try:
                kept = _read(folder / FILE, self.made_with)
            except FileNotFoundError:
                continue
            except InputError as error:
                problems.append(str(error))
                continue
            everything = _joined(everything, kept) if everything.keys else kept
        return everything, problems

    def _save(self, kept: Cached, folder: Path | None) -> bool:
        """Write the store to `folder`; whether that went well. A search does not fail for want of
        room for its features."""
        if folder is None:
            return False
        file = folder / FILE
        keys = torch.frombuffer(bytearray(json.dumps(kept.keys).encode()), dtype=torch.uint8)
        tensors = {"features": kept.features.contiguous(), "keys": keys}
        metadata = {"made_with": self.made_with, "content": _content_digest(**tensors)}
        try:
            with writing(file), atomic_write(file) as temporary:
                temporary.write_bytes(save(tensors, metadata))  # its own errors are no OSError
        except InputError as error:
            print(f"warning: features are not kept: {error.__cause__ or error}")
            return False
        return True

    @contextmanager
    def _locked(self) -> Iterator[Path | None]:
        """The first of the folders that can be written, and no other program writes to it until the
        block ends. Without one, None, after a warning."""
        waiting = f"waiting for another program that encodes the same {self.kind}"
        reason = "there is no home folder"
        with ExitStack() as stack:
            for folder in self.folders:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock(folder / "lock", waiting))
                    for left in folder.glob(f"{TEMPORARY}*"):  # by a program that was killed
                        left.unlink()
                except OSError as error:
                    reason = str(error)
                    continue
                except NotImplementedError:
                    pass  # no locks here: of two programs at once the last one's file stays
                yield folder
                return
            print(f"warning: features are not kept: {reason}")
            yield None


def _read(file: Path, made_with: str) -> Cached:
    """The content of a store's file. Raises `InputError` if it cannot be used, and
    `FileNotFoundError`."""
    try:
        with safe_open(file, "pt") as stored:
            about = stored.metadata() or {}
            # Copies: Windows does not replace a file that is mapped.
            tensors = {name: stored.get_tensor(name).clone() for name in ("features", "keys")}
        is_whole = about["content"] == _content_digest(**tensors)
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file can break its reader in any way
        is_whole = False
    if not is_whole:
        raise InputError(f"{file}: damaged, or another program's")
    if about.get("made_with") != made_with:
        raise InputError(f"{file}: made with other weights, or another version of this program")
    return Cached(json.loads(tensors["keys"].numpy().tobytes()), tensors["features"])


def _joined(first: Cached, second: Cached) -> Cached:
    """Both, without what of the second is in the first."""
    known = set(first.keys)
    new = [row for row, key in enumerate(second.keys) if key not in known]
    keys = first.keys + [second.keys[row] for row in new]
    return Cached(keys, torch.cat([first.features, second.features[new]]))


def _made_with(model: CLIP, kind: Kind) -> str:
    """A digest of all that a feature depends on, but for the image or caption: the weights of the
    tower, the sizes and the preprocessing. It takes the weights from the model, since a file's time
    and size do not tell for certain that it is still the same."""
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("visual.") == (kind == "images") and name != "logit_scale"
    }
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(_tensor_digest, own.values()))
    shapes = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in own.items()]
    return _digest(FORMAT, PIL.__version__, model.config, shapes, digests)


def _tensor_digest(tensor: Tensor) -> str:
    numbers = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(numbers.view(torch.uint8).numpy()).hexdigest()


def _content_digest(features: Tensor, keys: Tensor) -> str:
    """Tells a damaged file: safetensors checks the lengths alone."""
    return _digest(list(features.shape), _tensor_digest(features), _tensor_digest(keys))


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode(errors="surrogatepass")).hexdigest()


def _places(weights: Path) -> list[Path]:
    """The folders for stores of these weights, the first choice first. Weights that are a folder
    are another program's, in which nothing is written."""
    weights = weights.absolute()
    run = run_folder(weights)
    places = [run / "features" if run else weights.with_name("features")]
    if weights.is_dir():
        places.clear()
    with suppress(RuntimeError):  # the home folder is unknown
        places.append(_user_cache() / "clip_features" / _digest(str(weights))[:16])
    return places


def _user_cache() -> Path:
    """The user's folder for files that a program can make again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
