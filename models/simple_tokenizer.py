"""CLIP's tokenizer: text to the ids of byte-pair tokens (Sennrich et al. 2016, algorithm 1).

The symbols are the bytes of UTF-8, as in GPT-2 (Radford et al. 2019, section 2.2), so that no text
is unknown.
"""

import gzip
import html
import re
from array import array
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import regex
from tokenizers import Tokenizer
from tokenizers.models import BPE

MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
END_OF_WORD = "</w>"
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

# A word is an English contraction, a run of letters, one digit, or a run of any other characters
# except white space.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# Printable ASCII without "&", and Chinese characters: text that neither ftfy nor HTML can change.
PLAIN = re.compile("[ -%'-~\u4e00-\u9fff]*")
REMEMBERED = 2**16  # texts without white space, since texts repeat words


def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary: first the
    bytes with a printable Latin-1 character, then the others, with characters from number 256 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printing += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printing]
    symbols = {byte: chr(byte) for byte in printing}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


def chunks(text: str) -> list[str]:
    """The parts of `text` between white space, in lower case, after repairing broken Unicode and
    unescaping HTML twice, because text from the web is often escaped twice."""
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower().split()


def _cleaned(texts: list[str]) -> Iterable[str]:
    """The texts with spaces as their only white space, after the repairs of `chunks`."""
    if PLAIN.fullmatch("".join(texts)):  # faster than one by one
        return texts
    return (text if PLAIN.fullmatch(text) else " ".join(chunks(text)) for text in texts)


class SimpleTokenizer:
    """Text to token ids, with the 49,408 tokens of all published CLIP models.

    Text never becomes a special token: a caption's `<|endoftext|>` becomes tokens for its
    punctuation and letters, so that no caption ends early.
    """

    def __init__(self, merges_file: Path = MERGES_FILE):
        lines = gzip.decompress(merges_file.read_bytes()).decode().splitlines()[1:]
        self.merges = merges = [tuple(line.split(" ")) for line in lines]
        self.symbol_of_byte = symbols = byte_symbols()
        tokens = [*symbols.values(), *(symbol + END_OF_WORD for symbol in symbols.values())]
        tokens += ["".join(merge) for merge in merges]
        tokens += [START_OF_TEXT, END_OF_TEXT]

        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.decoder = tokens
        self.start_of_text = self.encoder[START_OF_TEXT]
        self.end_of_text = self.encoder[END_OF_TEXT]
        self.padding = 0
        self.words = range(self.start_of_text)
        self._merges = Tokenizer(BPE(self.encoder, merges, end_of_word_suffix=END_OF_WORD))
        self.of_chunk = _TokensOfChunk(self)

    @cached_property
    def fragments(self) -> list[int]:
        """The ids of tokens that do not end a word."""
        return [i for i, t in enumerate(self.decoder) if not t.endswith(END_OF_WORD)][:-2]

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""
        return [*memoryview(b"".join(map(self.of_chunk.__getitem__, chunks(text)))).cast("i")]

    def encode_all(self, texts: list[str]) -> bytes:
        """The token ids of all texts, end to end, each with start-of-text and end-of-text token, as
        C integers. One long string is encoded much faster than many."""
        lines = "\n".join(["", *_cleaned(texts), ""]).lower().replace("\n", " \n ")
        encoded = b"".join(map(self.of_chunk.__getitem__, lines.split(" ")))
        around = len(self.of_chunk["\n"]) // 2  # before the first text and after the last
        return encoded[around:-around]

    def without_spaces(self, texts: list[str]) -> list[str]:
        """The texts as their tokens see them, but for white space."""
        return "\n".join(_cleaned(texts)).lower().replace(" ", "").split("\n")

    def transformers_files(self, context_length: int) -> dict[str, Any]:
        merges = map(" ".join, self.merges)
        special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
                   "unk_token": END_OF_TEXT}  # fmt: skip
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
        return {
            "vocab.json": self.encoder,
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer_config.json": settings | special,
            "special_tokens_map.json": special,
        }

    def encode_word(self, word: str) -> list[int]:
        """The token ids of a word, whose symbols are merged in pairs: the pair first in the list of
        merges first, and of equal pairs the leftmost."""
        symbols = "".join(self.symbol_of_byte[byte] for byte in word.encode("utf-8"))
        return self._merges.encode(symbols, add_special_tokens=False).ids


class _TokensOfChunk(dict[str, bytes]):
    """The token ids, as C integers, of texts without white space, and of the end of a line."""

    def __init__(self, tokenizer: SimpleTokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, chunk: str) -> bytes:
        if len(self) == REMEMBERED:
            self.clear()
        words = map(self.tokenizer.encode_word, WORD.findall(chunk))
        end = [self.tokenizer.end_of_text, self.tokenizer.start_of_text]
        ids = end if chunk == "\n" else chain.from_iterable(words)
        self[chunk] = encoded = array("i", ids).tobytes()
        return encoded
