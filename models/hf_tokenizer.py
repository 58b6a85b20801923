"""Tokenizers of the library transformers, for models of open_clip."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from models.errors import InputError, one_line

# Files that describe a tokenizer, of which a model has some.
FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model",
         "sentencepiece.bpe.model")  # fmt: skip


class HFTokenizer:
    """open_clip's wrapper of a tokenizer, with our interface; see `models.tokens.Tokenizer`."""

    fragments: list[int] = []  # noqa: RUF012 - unknown

    def __init__(self, source: str | Path, settings: dict[str, object]):
        from open_clip.tokenizer import HFTokenizer as Wrapper

        wrapper = Wrapper(source, **settings)
        self.clean, self.wrapped = wrapper.clean_fn, wrapper.tokenizer
        *start, self.end_of_text = self.wrapped("").input_ids
        if len(start) > 1 or self.wrapped.pad_token_id is None:
            raise InputError("puts several tokens before a text, or has none for padding")
        self.start_of_text = start[0] if start else None
        self.padding = self.wrapped.pad_token_id
        if wrapper.strip_sep_token:
            self.end_of_text = 0
        special = [-1, *sorted(self.wrapped.all_special_ids), len(self.wrapped)]
        first, end = max(pairwise(special), key=lambda gap: gap[1] - gap[0])
        self.words = range(first + 1, end)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without those around it."""
        return self.wrapped(self.clean(text), add_special_tokens=False).input_ids

    def save(self, folder: Path) -> None:
        """Write the files of the tokenizer, unless `folder` has them."""
        if not (folder / FILES[0]).exists():
            self.wrapped.save_pretrained(folder)


@lru_cache
def hf_tokenizer(name: str, folder: Path | None, settings: str) -> HFTokenizer:
    """The tokenizer in `folder`, or else that of the repository `name` of the Hugging Face hub.
    `settings` are open_clip's, in JSON. Raises `InputError` if it cannot be read."""
    is_here = folder is not None and (folder / FILES[0]).exists()
    try:
        return HFTokenizer(folder if is_here else name, json.loads(settings))
    except Exception as error:  # of transformers or open_clip
        raise InputError(
            f"{folder or name}: its tokenizer cannot be read ({one_line(error)}); put "
            f"{FILES[0]} and tokenizer.json of {one_line(name)} into the folder of the weights"
        ) from None
