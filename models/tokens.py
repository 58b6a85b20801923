"""Texts to rows of token ids, by the tokenizer of a model."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError, quoted
from models.simple_tokenizer import SimpleTokenizer

PIECE = 2**14  # texts that are tokenised at a time
AT_ONCE = 2**20  # texts that are tokenised before the first is used, which takes seconds
SAMPLE = 2**15  # texts


class Tokenizer(Protocol):
    """The interface of a model's tokenizer."""

    start_of_text: int | None  # ids of the special tokens around a text
    end_of_text: int
    padding: int  # the id after them
    words: range  # ids of the tokens of texts
    fragments: list[int]  # ids of parts of words, and of unknown characters

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""

    def transformers_files(self, context_length: int) -> dict[str, Any]:
        """The files of transformers' tokenizer by name: texts, and objects for JSON."""


@lru_cache
def clip_tokenizer() -> SimpleTokenizer:
    """CLIP's own tokenizer, read from its file once."""
    return SimpleTokenizer()


@lru_cache
def chinese_tokenizer() -> Tokenizer:
    """The tokenizer of Chinese-CLIP, which needs a library of its own."""
    from models.wordpiece import WordPieceTokenizer

    return WordPieceTokenizer()


class TokenizedTexts:
    """n texts as token ids. `tokens[rows]` is int32 `[len(rows), context_length]` with padding,
    where long texts are cut before their end-of-text token.

    All are tokenised when the first ones are asked for, unless they are more than `AT_ONCE` and of
    CLIP's tokenizer: then only what is asked for is tokenised, each time.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], context_length: int):
        self.tokenizer, self.texts, self.context_length = tokenizer, texts, context_length
        self.is_lazy = len(texts) > AT_ONCE and isinstance(tokenizer, SimpleTokenizer)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        rows = range(len(self))[rows] if isinstance(rows, int | slice) else rows
        rows = np.asarray(rows, np.int64)
        if self.is_lazy and rows.size < len(self):
            return self.of(rows.flatten())[:].view(*rows.shape, self.context_length)
        ids, starts = self._encoded
        first, lengths = starts[rows, None], self.lengths[rows, None]
        places = np.arange(self.context_length)
        tokens = ids[np.minimum(first + places, len(ids) - 1)].astype(np.int32)
        tokens[places >= lengths] = self.tokenizer.padding
        is_cut = lengths[..., 0] > self.context_length
        tokens[..., -1] = np.where(is_cut, self.tokenizer.end_of_text, tokens[..., -1])
        return torch.from_numpy(tokens)

    @cached_property
    def sample(self) -> "TokenizedTexts":
        """The same texts, or if they are lazy, some of them, drawn at random."""
        if not self.is_lazy:
            return self
        drawn = np.random.default_rng(0).choice(len(self), min(SAMPLE, len(self)), replace=False)
        return self.of(np.sort(drawn))

    def of(self, rows: np.ndarray) -> "TokenizedTexts":
        """The texts at these indices."""
        texts = [self.texts[row] for row in rows.tolist()]
        return TokenizedTexts(self.tokenizer, texts, self.context_length)

    @cached_property
    def _encoded(self) -> tuple[np.ndarray, np.ndarray]:
        """All ids end to end, so that a short text takes little memory: text i, with its start and
        end, is from `starts[i]` to `starts[i + 1]`."""
        parts, lengths = [np.empty(0, np.uint16)], [[0]]
        for piece in _pieces(self.texts):
            ids, ends = _encoded(self.tokenizer, piece)
            parts.append(ids.astype(np.uint16) if ids.max() < 2**16 else ids)
            lengths.append(np.diff(ends, prepend=0))
        return np.concatenate(parts), np.cumsum(np.concatenate(lengths))

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, uncut, with start and end: `[n]`."""
        return np.diff(self._encoded[1])

    @property
    def is_cut(self) -> np.ndarray:
        """Whether a text does not fit into its row: `[n]`."""
        return self.lengths > self.context_length

    @cached_property
    def first_equal(self) -> Tensor:
        """For each text, the first one that has the same tokens, uncut: `[n]`. Of lazy texts, those
        alone are tokenised that are equal but for white space and case."""
        if not self.is_lazy:
            return torch.from_numpy(_first_of_equals(self._token_digests()))
        digests = array("q")
        for piece in _pieces(self.texts):
            digests.extend(map(hash, self.tokenizer.without_spaces(piece)))
        digests = np.asarray(digests)
        first = _first_of_equals(digests)
        repeated = np.flatnonzero(np.bincount(first)[first] > 1)
        if len(repeated):
            digests[repeated] = self.of(repeated)._token_digests()
            first = _first_of_equals(digests)
        return torch.from_numpy(first)

    def _token_digests(self) -> np.ndarray:
        """Of 64 bits: two different ones of ten million texts are equal once in 300,000 sets."""
        ids, starts = self._encoded
        data, ends = ids.tobytes(), (starts * ids.itemsize).tolist()
        return np.fromiter((hash(data[i:k]) for i, k in pairwise(ends)), np.int64, len(self))

    def counts(self, size: int) -> np.ndarray:
        """How often each id is in `tokens[:]`, with padding: `[size]`, or longer if an id is."""
        ids, starts = self._encoded
        counts = np.zeros(max(size, int(ids.max(initial=0)) + 1), np.int64)
        for start in range(0, len(ids), PIECE):  # numpy makes 64 bits of each
            counts += np.bincount(ids[start : start + PIECE], minlength=len(counts))
        counts[self.tokenizer.padding] += np.maximum(self.context_length - self.lengths, 0).sum()
        for text in np.flatnonzero(self.is_cut):
            cut = slice(starts[text] + self.context_length - 1, starts[text + 1] - 1)
            np.subtract.at(counts, ids[cut], 1)
        return counts


def _pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    return iter(lambda: [*islice(texts, PIECE)], [])


def _first_of_equals(values: np.ndarray) -> np.ndarray:
    """For each value the index of the first one that equals it: `[n]`."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of all texts, end to end, each with its special tokens, and where each text
    ends: C integers, and int64 `[n]`."""
    if isinstance(tokenizer, SimpleTokenizer):
        ids = np.frombuffer(tokenizer.encode_all(texts), np.intc)
        return ids, np.flatnonzero(ids == tokenizer.end_of_text) + 1
    start = [] if tokenizer.start_of_text is None else [tokenizer.start_of_text]
    encoded = [[*start, *tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    return np.fromiter(chain.from_iterable(encoded), np.intc), np.cumsum([*map(len, encoded)])


def token_rows(
    tokenizer: Tokenizer, texts: str | list[str], context_length: int, truncate: bool = False
) -> Tensor:
    """n texts -> int32 token ids `[n, context_length]`.

    A row holds the start-of-text token, the tokens of the text, the end-of-text token, and padding.
    A text that is too long is cut before its end-of-text token if `truncate`; otherwise it raises
    `InputError`, as does anything that is not a string.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {type(text).__name__}, not a string: {quoted(text)}")
    tokens = TokenizedTexts(tokenizer, texts, context_length)
    if not truncate and tokens.is_cut.any():
        i = int(tokens.is_cut.argmax())
        raise InputError(
            f"text {i} has {tokens.lengths[i]} tokens, where {context_length} fit: "
            f"{texts[i][:60]!r}{'...' if len(texts[i]) > 60 else ''}; shorten it"
        )
    return tokens[:]


def fitting(tokenizer: Tokenizer, context_length: int) -> int:
    """The number of a text's own tokens that a row holds."""
    return context_length - (1 if tokenizer.start_of_text is None else 2)


def first_alike(tokenizer: Tokenizer, texts: list[str], context_length: int) -> list[int]:
    """For each text, the index of the first text with the same row of tokens, which a model cannot
    tell apart."""
    first: dict[tuple[int, ...], int] = {}
    fits = fitting(tokenizer, context_length)
    cut = (tuple(tokenizer.encode(text)[:fits]) for text in texts)
    return [first.setdefault(tokens, index) for index, tokens in enumerate(cut)]
