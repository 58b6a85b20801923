"""CLIP's tokenizer: text, cleaned and in lower case, to the ids of byte-pair tokens.

Byte-pair encoding is described in Sennrich et al. 2016, algorithm 1. Here its symbols are the bytes
of UTF-8, as in GPT-2 (Radford et al. 2019, section 2.2), so no text in any language is unknown to
it.
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
# The number of a character in HTML, like &#000233;. Only its first eight digits after the zeros
# are captured: the largest number of a character has seven.
REFERENCE = regex.compile(r"&#0*([0-9]{1,8})[0-9]*")
# Printable ASCII without "&", and Chinese characters: text that neither ftfy nor HTML can change.
PLAIN = re.compile("[ -%'-~\u4e00-\u9fff]*")


def byte_symbols() -> dict[int, str]:
    """A printable character for each of the 256 bytes.

    A byte whose Latin-1 character is printable gets that character; the others get the characters
    from number 256 on. The printable bytes come first, as in CLIP's vocabulary.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printing += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printing]
    symbols = {byte: chr(byte) for byte in printing}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """Mend broken Unicode, unescape HTML, replace white space by single spaces, lower the case.

    HTML is unescaped twice, because text from the web is often escaped twice.
    """
    if not PLAIN.fullmatch(text):
        text = unescape(unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def unescape(text: str) -> str:
    """As `html.unescape`, but without its `ValueError` for a number of more than 4,300 digits."""
    return html.unescape(REFERENCE.sub(r"&#\1", text) if "&#" in text else text)


class SimpleTokenizer:
    """Text to token ids and back, with the 49,408 tokens of all published CLIP models.

    The special tokens `<|startoftext|>` and `<|endoftext|>` are never made from text: where a
    caption contains `<|endoftext|>`, it becomes tokens for its punctuation and letters. So no
    caption can end early.
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
        self.words = range(self.start_of_text)
        self.fragments = [i for i, t in enumerate(tokens) if not t.endswith(END_OF_WORD)][:-2]
        self.encode_chunk = lru_cache(maxsize=2**16)(self._encode_chunk)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""
        return [*chain.from_iterable(map(self.encode_chunk, clean(text).split()))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids, in lower case and with a space after each word.

        Special tokens are written out. Where the bytes are not UTF-8, because the text was cut in
        the middle of a character, U+FFFD stands for them.
        """
        data = bytearray()
        for token in tokens:
            symbols = self.decoder[token]
            word_ends = symbols.endswith(END_OF_WORD)
            data += bytes(self.byte_of_symbol[s] for s in symbols.removesuffix(END_OF_WORD))
            if word_ends or token >= self.start_of_text:
                data += b" "
        return data.decode("utf-8", errors="replace")

    def transformers_files(self, context_length: int) -> dict[str, Any]:
        """The files of transformers' tokenizer by name: texts, and objects for JSON."""
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
        """The token ids of text without white space. Texts have few different ones, so that most
        are not computed but remembered."""
        return tuple(token for word in WORD.findall(chunk) for token in self._encode_word(word))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = [self.symbol_of_byte[byte] for byte in word.encode("utf-8")]
        symbols[-1] += END_OF_WORD
        return tuple(self.encoder[part] for part in self._merge(symbols))

    def _merge(self, symbols: list[str]) -> list[str]:
        """Merge neighbouring symbols as long as a pair of them is in `priorities`: of all such
        pairs the one with the lowest number first, and of equal ones the leftmost.

        n symbols take O(n log n), because a heap gives the next pair. That matters for text without
        spaces, such as Chinese, where a word can be a page long. The heap gives the right order,
        because a merge always has a higher number than the merges that made its parts.
        """
        # `before` and `after` link the parts to a ring. Its last part is empty and stands between
        # the end and the start of the word, so that those are never merged.
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
                continue  # one of the two was merged with another part in the meantime
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            push_pair(before[left])
            push_pair(left)
        return [part for part in parts if part]
