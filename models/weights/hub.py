"""Weights on the Hugging Face hub, by open_clip's name or by the name of a repository.

The library huggingface_hub downloads them to its cache; cached files are used without asking the
hub. The library, with its web client, is imported late.
"""

import csv
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from models.errors import InputError, near_names, one_line
from models.files import read_json
from models.weights import open_clip, transformers
from models.weights.download import Unavailable, download
from models.weights.formats import FORMATS
from models.weights.registry import CONFIGS, SHA256, weights_url

PREFIX = "hf-hub:"  # as open_clip and timm have it
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
FILE_TYPES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # endings that no repository has


class HubWeights(NamedTuple):
    """A row of hub_names.tsv: weights of open_clip's list, or of Chinese-CLIP."""

    name: str  # open_clip's names of the architecture and of the weights; or the repository
    repository: str
    trained_on: str
    million_parameters: float
    resolution: int  # pixels
    activation: str  # that the weights were trained with; empty for a model built by open_clip


def _read_table() -> dict[str, HubWeights]:
    with Path(__file__).with_name("hub_names.tsv").open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t")
    return {
        name: HubWeights(name, repository, data, float(size), int(side), activation)
        for name, repository, data, size, side, activation in rows
    }


HUB = _read_table()
OPEN_CLIP = {name: row for name, row in HUB.items() if name != row.repository}
ARCHITECTURES = {name.partition("/")[0].lower() for name in (*CONFIGS, *OPEN_CLIP)}


def repository_of(name: str) -> str | None:
    """The repository, `owner/name` or `owner/name@revision`, of a name. None for what looks like a
    path or a mistyped name of weights; the prefix `hf-hub:` makes it a repository."""
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
    """The copy of weights that OpenAI published: of `ViT-L/14@336px` it is `ViT-L-14-336/openai`"""
    return HUB[f"{name.replace('/', '-').replace('@', '-').removesuffix('px')}/openai"]


def fetch(name: str) -> Path:
    """The folder of the weights `name` and their description, downloaded if need be. Raises
    `InputError` if they are not available, or not those of a CLIP model."""
    try:
        return Repository(repository_of(name)).complete()
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def fetch_published(name: str, path: Path) -> Path:
    """Weights that OpenAI published: the file at `path`, downloaded if need be; or the folder of
    their copy on the hub. Raises `InputError` if neither is available."""
    copy = published_copy(name)
    folder = None if path.exists() else cached(copy.repository)
    if folder is None:
        try:
            return download(weights_url(name), path, SHA256[name])
        except Unavailable as unavailable:
            print(f"{path.name}: not available from {weights_url(name)}; using its copy "
                  f"{copy.repository} on the Hugging Face hub", file=sys.stderr)  # fmt: skip
            try:
                folder = fetch(copy.name)
            except InputError as error:
                raise InputError(f"{unavailable}\nNor is its copy available:\n{error}") from None
    if open_clip.description(folder) != CONFIGS[name]:
        raise InputError(f"{folder}: should be a copy of {name}, but describes another model; "
                         f"delete it, and save {weights_url(name)} as {path}")  # fmt: skip
    return folder


def cached(repository: str) -> Path | None:
    """The folder of weights in the cache; None if they are not complete there."""
    with suppress(InputError):
        return Repository(repository, asks=False).complete()
    return None


class Repository:
    """The files of a repository in the cache and, unless `asks` is false, on the hub."""

    def __init__(self, repository: str, asks: bool = True):
        self.name, _, revision = repository.partition("@")
        self.revision = revision or "main"
        self.is_announced = False  # whether a line says that the hub is asked
        self.no_answer = None if asks else "not asked"  # why the hub is no longer asked
        self.unknown: set[str] = set()  # files that the cache lacks and the hub may have

    def complete(self) -> Path:
        """The folder of the repository in the cache, with all that `read_weights` reads of it, in
        the first of `FORMATS` that the repository has. Raises `InputError` if it has none."""
        for each in FORMATS.values():
            if folder := each.fetch(self):
                return folder
        raise InputError(self.refusal())

    def has_weights(self, names: tuple[str, ...]) -> bool:
        """Whether the first of the files `names` that exists is in the cache now, whole or in the
        files that its index lists."""
        for name in names:
            if self.get(name):
                return True
            if index := self.get(f"{name}.index.json"):
                table = read_json(index).get("weight_map")
                files = set(map(str, table.values())) if isinstance(table, dict) else set()
                return all([self.get(file) for file in files if Path(file).name == file])
        return False

    def get(self, file: str) -> Path | None:
        """A file in the cache; None if the repository lacks it, or if that is unknown. After the
        first, all files are of the same commit."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, file, revision=self.revision)
        if path is None and not self.no_answer:
            path = self.download(file)
        elif path is None:
            self.unknown.add(file)
        if not isinstance(path, str):  # the library's mark that the repository has no such file
            return None
        self.revision = Path(path).parent.name
        return Path(path)

    def download(self, file: str) -> str | None:
        """The path of a file, downloaded to the cache; None if the hub does not give it."""
        from huggingface_hub import constants, errors, hf_hub_download
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # else it prints every attempt
        address = f"{constants.ENDPOINT}/{self.name}"
        if not (self.is_announced or constants.HF_HUB_OFFLINE):
            print(f"asking {address}, for a minute if it does not answer", file=sys.stderr)
            self.is_announced = True
        try:
            return hf_hub_download(self.name, file, revision=self.revision)
        except errors.GatedRepoError:
            raise InputError(
                f"agree to the terms on {address}, then log in here (hf auth login, or HF_TOKEN)"
            ) from None
        except errors.RepositoryNotFoundError:
            near = near_names(self.name, {row.repository for row in HUB.values()})
            raise InputError(
                f"no file or folder here, and {address} does not exist, or is private: then log in "
                f"(hf auth login, or HF_TOKEN){near}"
            ) from None
        except errors.RevisionNotFoundError:
            raise InputError(f"{address} has no revision {self.revision}") from None
        except errors.LocalEntryNotFoundError as error:
            self.no_answer = one_line(error.__cause__ or error)
            self.unknown.add(file)
        except errors.EntryNotFoundError:
            pass
        except Exception as error:  # of requests or httpx
            is_disk = isinstance(error, OSError) and not isinstance(error, ConnectionError)
            if is_disk and error.errno:
                raise InputError(
                    f"{file} cannot be saved in {constants.HF_HUB_CACHE} ({error.strerror}); make "
                    "room, or choose another folder with HF_HOME"
                ) from None
            raise InputError(
                f"the download of {file} failed; run it again, from a mirror with "
                f"HF_HUB_DISABLE_XET=1, or {self.by_hand()}\n({one_line(error)})"
            ) from None
        return None

    def refusal(self) -> str:
        """Why there are no weights."""
        from huggingface_hub import constants

        if self.no_answer:
            known = {row.repository for row in HUB.values()}
            near = "" if self.name in known else near_names(self.name, known)
            reason, way = self.no_answer, "name a mirror (HF_ENDPOINT=https://<mirror>)"
            if constants.HF_HUB_OFFLINE:
                reason, way = "HF_HUB_OFFLINE is set", "unset that"
            return (
                f"no file or folder here, and {constants.ENDPOINT} does not give it ({reason}); "
                f"{way}, or {self.by_hand()}{near}\n"
                f"(not whole in the cache {constants.HF_HUB_CACHE})"
            )
        found = self.get(transformers.CONFIG_FILE)
        content = read_json(found) if found else {}
        if twin := transformers.open_clips_twin(content):
            return f"is a SigLIP in the format of transformers; take open_clip's copy: {twin}"
        model_type = content.get("model_type")
        reason = f"is for a model of type {one_line(model_type)!r}; it " if model_type else ""
        files = " nor ".join(each.hub_files for each in FORMATS.values() if each.hub_files)
        return (
            f"{constants.ENDPOINT}/{self.name} {reason}has no weights of a CLIP with a "
            f"description: neither {files}; if there are some in a file of another name, download "
            "that and give the file"
        )

    def by_hand(self) -> str:
        from huggingface_hub import constants

        files = ", or ".join(each.hub_files for each in FORMATS.values() if each.hub_files)
        return (
            f"get {files}, by other means, put them into one folder and give that folder\n"
            f"from {constants.ENDPOINT}/{self.name}/tree/{self.revision}"
        )
