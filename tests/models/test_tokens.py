"""Texts as rows of token ids, tokenised at once or when they are asked for."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from models import tokens
from models.simple_tokenizer import SimpleTokenizer
from models.tokens import TokenizedTexts, chinese_tokenizer, clip_tokenizer

LENGTH = 8
WORDS = [
    "a",
    "way",
    "away",
    "A",
    "dog",
    ".",
    "&amp;",
    "&",
    "ß",
    "SS",
    "狗",
    "İ",
    "\u2028",
    "\t",
    "\n",
    "  ",
]


@pytest.mark.parametrize("at_once", [2, 100])
@given(st.lists(st.lists(st.sampled_from(WORDS)).flatmap(
    lambda words: st.sampled_from(["", " "]).map(lambda space: space.join(words))
), min_size=1, max_size=30))  # fmt: skip
@example(["a way", "away", "Away", "a way", "a  way", ""])
@example(["x" * 9 + end for end in "ab"] + ["dog " * 6, "dog " * 7, " ".join("abcdefg")])
def test_texts_are_those_of_encode(at_once, texts):
    """Rows, lengths and equal texts follow from the tokens of each text alone."""
    clip = clip_tokenizer()
    alone = [(clip.start_of_text, *clip.encode(text), clip.end_of_text) for text in texts]
    rows = [(*ids[: LENGTH - 1], ids[-1]) if len(ids) > LENGTH else ids for ids in alone]
    rows = torch.tensor([(*row, *[clip.padding] * (LENGTH - len(row))) for row in rows])
    lengths = np.array([*map(len, alone)])

    with patch.object(tokens, "AT_ONCE", at_once):
        ours = TokenizedTexts(clip, texts, LENGTH)
    assert ours.is_lazy == (len(texts) > at_once)
    assert ours.first_equal.tolist() == [alone.index(ids) for ids in alone]
    some = np.arange(len(texts)).reshape(-1, 1)[::2]
    assert torch.equal(ours[some], rows[some]) and torch.equal(ours[0], rows[0])
    assert torch.equal(ours[1:], rows[1:]) and torch.equal(ours[:], rows)
    assert np.array_equal(ours.lengths, lengths)
    assert np.array_equal(ours.counts(49408), np.bincount(rows.flatten(), minlength=49408))


def test_only_what_is_asked_for_is_tokenised():
    """Of very many texts there is a sample; tokenizers whose tokens do not
    keep all characters, as BERT's, cannot compare texts without them."""
    texts = [f"{i} dogs" for i in range(100)]
    with patch.object(tokens, "AT_ONCE", 9), patch.object(tokens, "SAMPLE", 10):
        lazy = TokenizedTexts(clip_tokenizer(), texts, 77)
        assert len(set(lazy.sample.texts)) == 10 and set(lazy.sample.texts) < set(texts)
        assert TokenizedTexts(clip_tokenizer(), texts[:9], 77).sample.texts == texts[:9]
        chinese = TokenizedTexts(chinese_tokenizer(), ["ሀ", "ለ", *texts], 77)
        assert chinese.first_equal[:3].tolist() == [0, 0, 2]  # two unknown characters
    with patch.object(SimpleTokenizer, "encode_all", wraps=clip_tokenizer().encode_all) as encode:
        lazy.first_equal, lazy[3:5]
        assert [call.args for call in encode.call_args_list] == [(texts[3:5],)]
