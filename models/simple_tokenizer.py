"""CLIP's tokenizer: text to the ids of byte-pair tokens (Sennrich et al. 2016, algorithm 1).

The symbols are the bytes of UTF-8, as in GPT-2 (Radford et al. 2019, section 2.2), so that no text
is unknown.
"""

import gzip
import html
import re
from collections.abc import Iterable
from functools import lru_cache
from heapq import heappop, heappush
from itertools import chain
from pathlib import Path
from typing import Any

import ftfy
import regex

MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
END_OF_WORD = "</w>"
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

# A word is an English contraction, a run of letters, one digit, or a run of any other characters
# except white space.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# Printable ASCII without "&", and Chinese characters: text that neither ftfy nor HTML can change.
PLAIN = re.compile("[ -%'-~\u4e00-\u9fff]*")


def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes, in the order of CLIP's vocabulary: first the
    bytes with a printable Latin-1 character, then the others, with characters from number 256 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printing += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printing]
    symbols = {byte: chr(byte) for byte in printing}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """Repair broken Unicode, unescape HTML twice, because text from the web is often escaped twice,
    replace white space by single spaces, and lower the case."""
    if not PLAIN.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class SimpleTokenizer:
    """Text to token ids and back, with the 49,408 tokens of all published CLIP models.

    Text never becomes a special token: a caption's `<|endoftext|>` becomes tokens for its
    punctuation and letters, so that no caption ends early.
    """

    def __init__(self, merges_file: Path = MERGES_FILE):
        with gzip.open(merges_file, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().splitlines()[1:]]
        symbols = byte_symbols()
        tokens = [*symbols.values(), *(symbol + END_OF_WORD for symbol in symbols.values())]
        tokens += ["".join(merge) for merge in merges]
        tokens += [START_OF_TEXT, END_OF_TEXT]

        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.decoder = tokens
        self.priorities = {merge: i for i, merge in enumerate(merges)}  # 0 is merged first
        self.symbol_of_byte = symbols
        self.byte_of_symbol = {symbol: byte for byte, symbol in symbols.items()}
        self.start_of_text = self.encoder[START_OF_TEXT]
        self.end_of_text = self.encoder[END_OF_TEXT]
        self.padding = 0
        self.words = range(self.start_of_text)
        self.fragments = [i for i, t in enumerate(tokens) if not t.endswith(END_OF_WORD)][:-2]
        self.encode_chunk = lru_cache(maxsize=2**16)(self._encode_chunk)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""
        return [*chain.from_iterable(map(self.encode_chunk, clean(text).split()))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, in lower case and with a space after each word. Special tokens are
        written out; a character that was cut becomes U+FFFD."""
        data = bytearray()
        for token in tokens:
            symbols = self.decoder[token]
            word_ends = symbols.endswith(END_OF_WORD)
            data += bytes(self.byte_of_symbol[s] for s in symbols.removesuffix(END_OF_WORD))
            if word_ends or token >= self.start_of_text:
                data += b" "
        return data.decode("utf-8", errors="replace")

    def transformers_files(self, context_length: int) -> dict[str, Any]:
        merges = (" ".join(merge) for merge in self.priorities)
        special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
                   "unk_token": END_OF_TEXT}  # fmt: skip
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
        return {
            "vocab.json": self.encoder,
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer_config.json": settings | special,
            "special_tokens_map.json": special,
        }

    def _encode_chunk(self, chunk: str) -> tuple[int, ...]:
        """The token ids of text without white space, cached because texts repeat words."""
        return tuple(token for word in WORD.findall(chunk) for token in self._encode_word(word))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = [self.symbol_of_byte[byte] for byte in word.encode("utf-8")]
        symbols[-1] += END_OF_WORD
        return tuple(self.encoder[part] for part in self._merge(symbols))

    def _merge(self, symbols: list[str]) -> list[str]:
        """Merge neighbouring symbols as long as a pair of them is in `priorities`: the pair with
        the lowest number first, and of equal pairs the leftmost.

        A heap gives the next pair, in O(n log n) for n symbols, because text without spaces, such
        as Chinese, can be a word as long as a page. The order is right, because a merge has a
        higher number than the merges that made its parts.
        """
        # `before` and `after` link the parts to a ring. Its last part is empty, so that the end and
        # the start of the word are never merged.
        parts = [*symbols, ""]
        before = list(range(-1, len(symbols)))
        after = [*range(1, len(parts)), 0]
        heap: list[tuple[int, int]] = []

        def push_pair(left: int) -> None:
            priority = self.priorities.get((parts[left], parts[after[left]]))
            if priority is not None:
                heappush(heap, (priority, left))

        for left in range(len(symbols)):
            push_pair(left)
        while heap:
            priority, left = heappop(heap)
            right = after[left]
            if self.priorities.get((parts[left], parts[right])) != priority:
                continue  # one of the two was merged meanwhile
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            push_pair(before[left])
            push_pair(left)
        return [part for part in parts if part]
