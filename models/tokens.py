"""Texts to rows of token ids, by the tokenizer of a model."""

from array import array
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError, quoted
from models.simple_tokenizer import SimpleTokenizer


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


def token_rows(
    tokenizer: Tokenizer, texts: str | list[str], context_length: int, truncate: bool = False
) -> Tensor:
    """n texts -> int32 token ids `[n, context_length]`.

    A row holds the start-of-text token, the tokens of the text, the end-of-text token, and padding.
    A text that is too long is cut before its end-of-text token if `truncate`; otherwise it raises
    `InputError`, as does anything that is not a string.
    """
    start = [] if tokenizer.start_of_text is None else [tokenizer.start_of_text]
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids, lengths = array("i"), []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {type(text).__name__}, not a string: {quoted(text)}")
        row = [*start, *tokenizer.encode(text), tokenizer.end_of_text]
        if len(row) > context_length:
            if not truncate:
                raise InputError(
                    f"text {i} has {len(row)} tokens, where {context_length} fit: "
                    f"{text[:60]!r}{'...' if len(text) > 60 else ''}; shorten it"
                )
            row[context_length - 1 :] = [tokenizer.end_of_text]
        ids.extend(row)
        lengths.append(len(row))
    is_token = torch.arange(context_length) < torch.tensor(lengths)[:, None]
    size = len(texts), context_length
    tokens = torch.full(size, tokenizer.padding, dtype=torch.int32)
    tokens[is_token] = torch.from_numpy(np.array(ids, dtype=np.int32))
    return tokens


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
