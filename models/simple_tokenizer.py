"""CLIP's tokenizer: cleaned, lower-cased text into byte-pair tokens.

Byte-pair encoding of words: Sennrich et al. 2016, algorithm 1. It works on UTF-8 bytes, as in GPT-2
(Radford et al. 2019, section 2.2), so that no text in any language holds an unknown token.
"""

import gzip
import html
from collections.abc import Iterable
from functools import lru_cache
from heapq import heappop, heappush
from pathlib import Path

import ftfy
import regex

MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
END_OF_WORD = "</w>"
START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"

# English contractions, runs of letters, single digits, runs of anything else but space.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# A reference like &#000233; to a character, up to its eighth digit; a longer number is none.
REFERENCE = regex.compile(r"&#0*([0-9]{1,8})[0-9]*")


def byte_symbols() -> dict[int, str]:
    """A visible character for each of the 256 bytes: its own where it prints, else one from 256 up.

    The order is the vocabulary's: printing bytes first.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printing += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printing]
    symbols = {byte: chr(byte) for byte in printing}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """Mend broken Unicode, unescape HTML (twice: web text is often escaped twice), fold spaces."""
    text = unescape(unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def unescape(text: str) -> str:
    """`html.unescape`, which raises `ValueError` for a reference of more than 4,300 digits."""
    return html.unescape(REFERENCE.sub(r"&#\1", text) if "&#" in text else text)


class SimpleTokenizer:
    """Text to token ids and back, with the vocabulary of all published CLIP models (49,408 ids).

    The two special tokens are never made from text: a literal `<|endoftext|>` in a caption is
    punctuation and letters like any other. So a text cannot end itself early, whoever wrote it.
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
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.symbol_of_byte = symbols
        self.byte_of_symbol = {symbol: byte for byte, symbol in symbols.items()}
        self.start_of_text = self.encoder[START_OF_TEXT]
        self.end_of_text = self.encoder[END_OF_TEXT]
        self.encode_word = lru_cache(maxsize=2**16)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without start and end tokens."""
        return [token for word in WORD.findall(clean(text)) for token in self.encode_word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`: lower case, a space after each word, special tokens as written.

        Bytes that are no UTF-8 (a text cut within a character) become U+FFFD.
        """
        data = bytearray()
        for token in tokens:
            symbols = self.decoder[token]
            word_ends = symbols.endswith(END_OF_WORD)
            data += bytes(self.byte_of_symbol[s] for s in symbols.removesuffix(END_OF_WORD))
            if word_ends or token >= self.start_of_text:
                data += b" "
        return data.decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        symbols = [self.symbol_of_byte[byte] for byte in word.encode("utf-8")]
        symbols[-1] += END_OF_WORD
        return tuple(self.encoder[part] for part in self._merge(symbols))

    def _merge(self, symbols: list[str]) -> list[str]:
        """Join neighbours, the pair of lowest rank first, and of equal ones the leftmost.

        A merge's rank is above those of the merges that made its parts, so a heap finds the next
        pair, in O(n log n): a "word" can be a page long, as Chinese has no spaces.
        """
        parts = [*symbols, ""]  # a ring; the empty part, at -1, keeps end and start from joining
        before = list(range(-1, len(symbols)))
        after = [*range(1, len(parts)), 0]
        heap: list[tuple[int, int]] = []

        def offer(left: int) -> None:
            rank = self.ranks.get((parts[left], parts[after[left]]))
            if rank is not None:
                heappush(heap, (rank, left))

        for left in range(len(symbols)):
            offer(left)
        while heap:
            rank, left = heappop(heap)
            right = after[left]
            if self.ranks.get((parts[left], parts[right])) != rank:
                continue  # one of the two has been merged since
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            offer(before[left])
            offer(left)
        return [part for part in parts if part]
