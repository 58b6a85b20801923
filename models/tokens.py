"""Texts to rows of token ids, by the tokenizer that a model was trained with."""

from array import array
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from models.errors import InputError
from models.simple_tokenizer import SimpleTokenizer

MAX_QUOTED = 60  # characters of a text that an error message quotes


class Tokenizer(Protocol):
    """What a model's tokenizer has: the ids of the special tokens around a text, the ids of those
    that texts consist of, `words`, and `encode`.

    `fragments` are the ids of the tokens that do not end a word (CLIP's) or start one (WordPiece),
    and of the token for what is unknown: few of them show that it was made for such texts.
    """

    start_of_text: int
    end_of_text: int
    words: range
    fragments: list[int]

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""


@lru_cache
def clip_tokenizer() -> SimpleTokenizer:
    """CLIP's own tokenizer. It is read from its file once, on the first call."""
    return SimpleTokenizer()


@lru_cache
def chinese_tokenizer() -> Tokenizer:
    """The tokenizer of the Chinese-CLIP models, which alone need its library."""
    from models.wordpiece import WordPieceTokenizer

    return WordPieceTokenizer()


def token_rows(
    tokenizer: Tokenizer, texts: str | list[str], context_length: int, truncate: bool = False
) -> Tensor:
    """n texts -> int32 token ids `[n, context_length]`.

    A row holds the start-of-text token, the tokens of the text, the end-of-text token, and zeros to
    fill up. A text that is too long is cut if `truncate` is true, and still ends with the
    end-of-text token; otherwise it raises `InputError`, as does anything that is not a string.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    ids, lengths = array("i"), []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"text {i} is {type(text).__name__}, not a string: {text!r:.{MAX_QUOTED}}"
            )
        row = [tokenizer.start_of_text, *tokenizer.encode(text), tokenizer.end_of_text]
        if len(row) > context_length:
            if not truncate:
                raise InputError(
                    f"text {i} has {len(row)} tokens, where {context_length} fit: "
                    f"{text[:MAX_QUOTED]!r}{'...' if len(text) > MAX_QUOTED else ''}; "
                    "shorten it"
                )
            row[context_length - 1 :] = [tokenizer.end_of_text]
        ids.extend(row)
        lengths.append(len(row))
    is_token = torch.arange(context_length) < torch.tensor(lengths)[:, None]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int32)
    tokens[is_token] = torch.from_numpy(np.array(ids, dtype=np.int32))
    return tokens


def first_alike(tokenizer: Tokenizer, texts: list[str], context_length: int) -> list[int]:
    """For each text, the index of the first one whose row of tokens, cut where it is too long, is
    the same: a model cannot tell the two apart."""
    first: dict[tuple[int, ...], int] = {}
    fitting = (tuple(tokenizer.encode(text)[: context_length - 2]) for text in texts)
    return [first.setdefault(tokens, index) for index, tokens in enumerate(fitting)]
