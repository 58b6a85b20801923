"""The Chinese tokenizer compared with those of cn_clip and transformers, id for id."""

import json

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from script_runs import ROOT
from transformers import BertTokenizer

from models.errors import InputError
from models.tokens import chinese_tokenizer, token_rows
from models.wordpiece import LONGEST_WORD, VOCABULARY_FILE

SHARED = ROOT.parent / "shared" / "flickr8k"
SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")

ours = chinese_tokenizer().encode
transformers_tokenizer = BertTokenizer(vocab=str(VOCABULARY_FILE))


def transformers(text: str) -> list[int]:
    """After what the authors do first to texts that they train and score on, in `_preprocess_text`
    of cn_clip/training/data.py and cn_clip/eval/data.py."""
    text = text.replace("“", '"').replace("”", '"')
    return transformers_tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def authors():
    """cn_clip's module of the tokenizer; the test is skipped if it is not installed."""
    return pytest.importorskip("cn_clip.clip", reason="needs cn_clip")


@pytest.fixture(scope="module")
def cn_clip(authors):
    """Text to ids by cn_clip."""
    tokenizer = authors._tokenizer
    return lambda text: tokenizer.convert_tokens_to_ids(
        tokenizer.tokenize(text.replace("“", '"').replace("”", '"'))
    )


def flickr8k(language: str) -> list[str]:
    """All captions; the test is skipped if they are not there."""
    if not SHARED.exists():
        pytest.skip("needs Flickr8k")
    files = [SHARED / f"{language}_{split}.json" for split in ("train", "val")]
    entries = [entry for file in files for entry in json.loads(file.read_text("utf-8"))]
    captions = [caption for entry in entries for caption in entry["caption"]]
    assert len(captions) == 35000
    return captions


def test_vocabulary():
    tokenizer = chinese_tokenizer()
    theirs = transformers_tokenizer.get_vocab()
    # Both strip the two tokens that hold a line separator, which no text can bring.
    mine = {token.rstrip("\u2028"): i for token, i in tokenizer.encoder.items()}
    assert len(tokenizer.decoder) == 21128 and {t.strip(): i for t, i in theirs.items()} == mine
    assert (tokenizer.start_of_text, tokenizer.end_of_text) == (101, 102)
    assert sorted(tokenizer.decoder[i] for i in tokenizer.fragments)[:1] == ["##!"]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["cn", "en"])
def test_all_captions_of_flickr8k(language):
    captions = flickr8k(language)
    theirs = transformers_tokenizer(captions, add_special_tokens=False)["input_ids"]
    assert [ours(caption) for caption in captions] == theirs
    authors = pytest.importorskip("cn_clip.clip", reason="needs cn_clip")
    rows = token_rows(chinese_tokenizer(), captions, 52, truncate=True)
    assert (rows == authors.tokenize(captions)).all()


WORDS = ["一只", "狗", "。", "，", "Running", "café", "Ünïcödé", "3.5%", "２０２４年", "\u3000"]
WORDS += [
    "“",
    "”",
    "\x00",
    "\u200b",
    "\ufffd",
    "한국어",
    "これ",
    "😀",
    "don't",
    "#",
    "##ing",
    "\t",
    "\n",
]
texts = st.text() | st.lists(st.sampled_from(WORDS) | st.text(max_size=3)).map("".join)


@given(texts)
@example("\U0002b820")  # the library takes this ideograph for a letter, as transformers does
def test_any_text_has_the_ids_of_transformers(text):
    assume(len(text) <= 100 and not any(special in text for special in SPECIAL))
    assert ours(text) == transformers(text)


@given(texts)
def test_any_text_has_the_ids_of_cn_clip(cn_clip, text):
    """But for rare characters that Python and the library take for another kind: of control codes,
    private use, capitals that change at the end of a word, ideographs of extension E."""
    contexts = [template.format(c) for c in set(text) for template in ("a{}b", "a{}", "{}")]
    assume(all(cn_clip(context) == transformers(context) for context in contexts))
    assert ours(text) == cn_clip(text)


def test_curly_quotes_are_straight_ones():
    assert ours("他说“你好”") == ours('他说"你好"')
    assert chinese_tokenizer().encoder["[UNK]"] not in ours("“停”")


@pytest.mark.parametrize("special", SPECIAL)
def test_special_tokens_are_not_made_from_text(cn_clip, special):
    """As in cn_clip; transformers makes them."""
    assert ours(f"一只狗{special}狗") == cn_clip(f"一只狗{special}狗")
    assert not {0, 101, 102, 103} & set(ours(special))


@pytest.mark.parametrize("length", [100, 101, LONGEST_WORD, LONGEST_WORD + 1])
def test_a_long_word_is_unknown_where_it_is_to_cn_clip(cn_clip, length):
    """cn_clip knows words of up to 200 characters, transformers of up to 100."""
    word = "kawasaki" * 30
    assert ours(word[:length]) == cn_clip(word[:length])
    assert (len(ours(word[:length])) == 1) == (length > LONGEST_WORD)


def test_half_a_surrogate_pair_is_no_text():
    assert ours("狗\ud83d狗") == ours("狗狗")
    assert ours("\ud83d\ude02") == ours("😂")


@pytest.mark.parametrize("context_length", [10, 52, 512])
def test_texts_that_are_too_long_are_cut_like_cn_clips(authors, context_length):
    text = "一只棕色的狗在雪地里奔跑" * 50
    rows = token_rows(chinese_tokenizer(), [text, "狗"], context_length, truncate=True)
    assert (rows == authors.tokenize([text, "狗"], context_length)).all()
    assert rows.dtype == torch.int32
    with pytest.raises(InputError, match=f"text 0 has 602 tokens, where {context_length} fit"):
        token_rows(chinese_tokenizer(), [text], context_length)
