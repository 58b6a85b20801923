"""Weights on the Hugging Face hub, by open_clip's name or by the name of a repository. The library
huggingface_hub, imported late, downloads them to its cache; cached files need no network."""

import fnmatch
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError, near_names, one_line
from models.files import read_json
from models.hf_tokenizer import FILES as TOKENIZER_FILES
from models.open_clip_model import OpenClipConfig
from models.weights.download import Unavailable, download
from models.weights.formats import FORMATS, shards
from models.weights.interface import Format
from models.weights.registry import CONFIGS, SHA256, weights_url

WANTED = ("open_clip_config.json with open_clip_model.safetensors, or config.json and "
          "preprocessor_config.json with model.safetensors")  # fmt: skip
PREFIX = "hf-hub:"  # as open_clip and timm have it
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
FILE_TYPES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # endings that no repository has


class HubWeights(NamedTuple):
    """A row of hub_names.tsv: weights of open_clip's list, or of Chinese-CLIP."""

    name: str  # open_clip's names of the architecture and of the weights; or the repository
    repository: str
    trained_on: str
    million_parameters: str
    resolution: str  # pixels
    activation: str  # in the training of the weights; empty for a model built by open_clip


TABLE = Path(__file__).with_name("hub_names.tsv").read_text("utf-8").splitlines()
HUB = {row.name: row for row in (HubWeights(*line.split("\t")) for line in TABLE[1:])}
OPEN_CLIP = {name: row for name, row in HUB.items() if name != row.repository}
ARCHITECTURES = {name.partition("/")[0].lower() for name in (*CONFIGS, *OPEN_CLIP)}


def repository_of(name: str) -> str | None:
    """The repository `owner/name` of a name. None if the name looks like a path or like mistyped
    weights and has no prefix `hf-hub:`."""
    if name in HUB:
        return HUB[name].repository
    repository = name.removeprefix(PREFIX)
    if not REPOSITORY.fullmatch(repository):
        return None
    owner = repository.partition("/")[0]
    is_path = Path(owner).exists() or repository.lower().endswith(FILE_TYPES)
    is_mistyped = is_path or bool(near_names(owner, ARCHITECTURES))
    return None if repository == name and is_mistyped else repository


def published_copy(name: str) -> HubWeights:
    """The copy of OpenAI's weights on the hub: for `ViT-L/14@336px`, `ViT-L-14-336/openai`."""
    return HUB[f"{name.replace('/', '-').replace('@', '-').removesuffix('px')}/openai"]


def fetch(name: str) -> Path:
    """The folder of the weights `name`, downloaded if need be. `InputError` if there are none."""
    repository = repository_of(name)
    try:
        return cached(repository) or _download(repository)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def fetch_published(name: str, path: Path) -> Path:
    """OpenAI's weights: the file at `path`, downloaded if need be, or the folder of their copy on
    the hub. Raises `InputError` if neither is available."""
    copy = published_copy(name)
    if not path.exists() and (folder := cached(copy.repository)):
        return folder
    try:
        return download(weights_url(name), path, SHA256[name])
    except Unavailable as unavailable:
        print(f"{weights_url(name)} is not available; using {copy.repository}", file=sys.stderr)
        try:
            return fetch(copy.name)
        except InputError as error:
            raise InputError(f"{unavailable}\nNor is its copy available:\n{error}") from None


def cached(repository: str) -> Path | None:
    """The folder of weights in the cache; None if they are not complete there."""
    from huggingface_hub import errors, snapshot_download

    try:  # the folder, whatever is in it
        folder = Path(snapshot_download(repository, allow_patterns=[], local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    names = {file.name for file in folder.iterdir()}
    kind, weights = _find(names)
    if kind is None or not names.issuperset(_parts(folder / weights)):
        return None
    # A model whose preprocessing is unknown must not be taken for one without any.
    others = kind.descriptions[1:]
    return None if others and names.isdisjoint(others) else folder


def _download(repository: str) -> Path:
    """The folder of weights, downloaded in the first of `FORMATS` that the repository has."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if not constants.HF_HUB_OFFLINE:
        print(f"asking {constants.ENDPOINT}/{repository}, for a minute at most", file=sys.stderr)
    with _explained(repository):
        listing = HfApi().model_info(repository, timeout=60)
        names = {file.rfilename for file in listing.siblings}
        kind, weights = _find(names)
        if kind is None:
            raise InputError(
                f"{constants.ENDPOINT}/{repository} has no weights of a CLIP with a description: "
                f"no {WANTED}; if a file of another name has them, download and give that file"
            )
        for file in [file for file in kind.descriptions if file in names] or [weights]:
            folder = Path(hf_hub_download(repository, file)).parent
        about = kind.description(folder)  # refuses another model before a large download
        tokenizer = TOKENIZER_FILES if isinstance(about, OpenClipConfig) else ()
        for file in [*names.intersection(tokenizer), weights]:
            hf_hub_download(repository, file)
        for file in _parts(folder / weights):
            hf_hub_download(repository, file)
    return folder


def _find(names: set[str]) -> tuple[Format, str] | tuple[None, None]:
    """The first format whose files are among the names, and the weights' name or their index's."""
    for kind in FORMATS.values():
        for name in kind.files if names.issuperset(kind.descriptions[:1]) else ():
            for candidate in (name, f"{name}.index.json"):
                for weights in fnmatch.filter(names, candidate):
                    return kind, weights
    return None, None


def _parts(weights: Path) -> list[str]:
    """The files of the weights in a file or in those that an index lists."""
    return shards(read_json(weights)) if weights.suffix == ".json" else [weights.name]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn errors of the library within into `InputError`s with a remedy."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # else it prints every attempt
    address, known = f"{constants.ENDPOINT}/{name}", {row.repository for row in HUB.values()}
    near = "" if name in known else near_names(name, known)
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"agree to the terms on {address}, then log in here (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"no file or folder here, and {address} does not exist, or is private: then log in "
            f"(hf auth login, or HF_TOKEN){near}"
        ) from None
    except Exception as error:  # of the disk, requests or httpx
        raise InputError(
            f"no file or folder here, and {constants.ENDPOINT} does not give it "
            f"({one_line(error.__cause__ or error)}); run it again, name a mirror "
            "(HF_ENDPOINT=https://<mirror>, HF_HUB_DISABLE_XET=1 if it has small files alone), or "
            f"put {WANTED}, into a folder and give that folder{near}\nfrom {address}/tree/main\n"
            f"(not complete in the cache {constants.HF_HUB_CACHE}; HF_HOME names another)"
        ) from None
