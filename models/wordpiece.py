"""The tokenizer of Chinese-CLIP: text to the ids of BERT's word pieces (Devlin et al. 2019). Each
Chinese character is a word. Other words are split, from their start, into the longest pieces in the
vocabulary (Wu et al. 2016, section 4.1)."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

VOCABULARY_FILE = Path(__file__).with_name("bert_chinese_vocab.txt")
UNKNOWN, START_OF_TEXT, END_OF_TEXT = "[UNK]", "[CLS]", "[SEP]"
CURLY_QUOTES = str.maketrans("“”", '""')
CONTINUES = "##"  # starts a piece that is not the first of its word
LONGEST_WORD = 200  # characters; a longer word is unknown


class WordPieceTokenizer:
    """Text to token ids, with the 21,128 tokens of BERT's Chinese vocabulary. Text loses control
    characters and accents and is put into lower case; “ and ”, which the vocabulary lacks, become
    ", as in Chinese-CLIP's training data. Text never becomes a special token: a caption's `[SEP]`
    becomes tokens for its brackets and letters, as in cn_clip."""

    def __init__(self, vocabulary_file: Path = VOCABULARY_FILE):
        # Not splitlines: one of the tokens is a line separator (U+2028).
        tokens = vocabulary_file.read_text("utf-8").removesuffix("\n").split("\n")
        self.encoder = {token: i for i, token in enumerate(tokens)}
        self.decoder = tokens
        self.start_of_text = self.encoder[START_OF_TEXT]
        self.end_of_text = self.encoder[END_OF_TEXT]
        self.padding = 0
        self.words = range(self.encoder["!"], len(tokens))  # the special tokens come first
        self.fragments = [i for i, token in enumerate(tokens) if token.startswith(CONTINUES)]
        self.fragments.append(self.encoder[UNKNOWN])
        model = WordPiece(self.encoder, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.BertNormalizer()
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start-of-text and end-of-text token."""
        # The library refuses lone surrogates, which JSON can hold.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = text.translate(CURLY_QUOTES)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def transformers_files(self, context_length: int) -> dict[str, Any]:
        settings = {"tokenizer_class": "BertTokenizer", "model_max_length": context_length}
        return {
            "vocab.txt": "".join(f"{token}\n" for token in self.decoder),
            "tokenizer_config.json": settings,
        }
