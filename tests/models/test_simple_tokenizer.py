"""The tokenizer compared with those of open_clip and transformers, id for id."""

import html
import json
import random
import re
import string

import ftfy
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from script_runs import ROOT
from transformers import CLIPTokenizer

from models.clip_utils import tokenize
from models.errors import InputError
from models.simple_tokenizer import PLAIN, chunks
from models.tokens import clip_tokenizer

SHARED = ROOT.parent / "shared" / "flickr8k"
START, END = 49406, 49407
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>")
# open_clip makes special tokens from these even if they are part of a text. Ours does not.
OPEN_CLIP_SPECIAL = re.compile("<(start|end)_of_text>", re.IGNORECASE)


def captions(*files: str) -> list[str]:
    """All captions in annotation files of Flickr8k; the test is skipped if they are not there."""
    if not SHARED.exists():
        pytest.skip("needs Flickr8k")
    entries = [e for file in files for e in json.loads((SHARED / file).read_text("utf-8"))]
    return [caption for entry in entries for caption in entry["caption"]]


@pytest.fixture(scope="module")
def ours():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def transformers_tokenizer(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = "\n".join(" ".join(merge) for merge in ours.merges)
    (folder / "vocab.json").write_text(json.dumps(ours.encoder), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def test_vocabulary(ours, reference):
    assert ours.decoder[:START] == [reference.decoder[i] for i in range(START)]
    assert len(ours.decoder) == len(ours.encoder) == reference.vocab_size
    assert (ours.start_of_text, ours.end_of_text) == (START, END)
    assert ours.merges == list(reference.bpe_ranks)


# --- encode ---------------------------------------------------------------------------------------

# Letters with unusual lower case, white space, combining marks, contractions, HTML entities,
# special tokens, and text in the wrong encoding, which ftfy mends.
unusual = st.sampled_from(
    [
        *("İ", "ı", "ſ", "'ſ", "\u212a", "ß", "ẞ", "Σς", "\u0345", "e\u0301", "١²½ⅷ", "ﬁ"),
        *("\x1c", "\x1f", "\x85", "\xa0", "\u180e", "\u200b", "\u2028", "\u3000", "\ufeff", "\0"),
        *("'S", "'ll", "'VE", "''s", "’t", "n't", "</w>", "\ud800", "👨\u200d👩"),
        *("&amp;", "&amp;lt;", "&#x130;", "&nbsp;", "&lt", "Ã©", "â€™", "\x1b[1m", *SPECIAL[:2]),
        *("<start_of_text", "end_of_text>", "<|", "|>"),
    ]
)
texts = st.lists(unusual | st.text(max_size=6) | st.characters(categories=None), max_size=20)
texts = texts.map("".join)


@pytest.mark.slow
@settings(max_examples=1000)
@given(text=texts)
@example(text="")
@example(text="A photo of 2 dogs, isn't it?")
def test_encode_equals_open_clip_on_any_text(ours, reference, text):
    if not OPEN_CLIP_SPECIAL.search(" ".join(chunks(text))):
        assert ours.encode(text) == reference.encode(text)


@given(many=st.lists(texts | st.sampled_from(["", " ", "a  b", "\n", "a\nb", "\u2028", "ΑΣ", "İ"])))
@example(many=["two\nlines", "", "a dog", "ΟΔΟΣ."])
def test_many_texts_are_encoded_as_each_alone(ours, many):
    alone = [token for text in many for token in (START, *ours.encode(text), END)]
    assert [*memoryview(ours.encode_all(many)).cast("i")] == alone


# Every character that `chunks` passes over, and what among them could look like broken Unicode.
plain = st.text([*map(chr, range(32, 127)), "一", "鿿", "狗"]) | st.text("AaEe'\"`^~,;#x19 狗")


@pytest.mark.slow
@settings(max_examples=1000)
@given(text=plain.filter(PLAIN.fullmatch))
@example(text="".join(map(chr, range(0x4E00, 0xA000))))
def test_text_that_is_not_mended_needs_none(text):
    assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


@given(text=st.text(alphabet="abeinost'éß狗的", min_size=100, max_size=1000))
def test_encode_equals_open_clip_on_long_words(ours, reference, text):
    assert ours.encode(text) == reference.encode(text)


def test_a_page_without_spaces_does_not_take_long(ours):
    """It is one word with thousands of different merges. To go through the whole word for each of
    them would take too long."""
    page = "".join(random.Random(0).choices(string.ascii_lowercase, k=200_000))
    assert "".join(ours.decoder[i] for i in ours.encode(page)) == f"{page}</w>"
    tokens = tokenize("狗" + page, truncate=True)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END


def test_encode_equals_transformers_on_captions(ours, transformers_tokenizer):
    english = captions("en_val.json")
    expected = transformers_tokenizer(english)["input_ids"]
    assert [[START, *ours.encode(text), END] for text in english] == expected


@pytest.mark.parametrize("literal", [*SPECIAL, "<|ENDOFTEXT|>", "&lt;|endoftext|&gt;"])
def test_special_tokens_are_not_made_from_text(ours, literal):
    before, after = "a dog", "runs on the beach"
    ids = ours.encode(f"{before} {literal} {after}")
    assert ids == ours.encode(before) + ours.encode(literal) + ours.encode(after)
    assert not {START, END} & set(ids)
    assert not {START, END} & set(ours.encode(f"{before}{literal}{after}"))
    row = tokenize(f"{before} {literal} {after}")[0]
    assert row.argmax() == len(ids) + 1  # where the text tower is pooled


# --- tokenize -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "cn"])
def test_tokenize_equals_open_clip_on_all_captions(reference, language):
    texts = captions(f"{language}_train.json", f"{language}_val.json")
    assert len(texts) == 35_000
    assert torch.equal(tokenize(texts, truncate=True), reference(texts).int())


def test_tokenize_start_end_and_padding(ours):
    texts = ["two dogs run", "", "a " * 20]
    tokens = tokenize(texts)
    assert tokens.shape == (3, 77)
    assert tokens.dtype == torch.int32
    for row, text in zip(tokens.tolist(), texts, strict=True):
        ids = [START, *ours.encode(text), END]
        assert row == ids + [0] * (77 - len(ids))


def test_tokenize_takes_a_string_a_tuple_or_no_text():
    assert torch.equal(tokenize("two dogs"), tokenize(["two dogs"]))
    assert torch.equal(tokenize(("two dogs",), context_length=9), tokenize("two dogs")[:, :9])
    assert tokenize([]).shape == (0, 77)


@pytest.mark.parametrize("context_length", [4, 77])
def test_a_text_that_is_too_long_is_refused_or_cut(ours, context_length):
    words = context_length - 2
    assert tokenize("dog " * words, context_length)[0, -1] == END
    long = "dog " * (words + 1)
    with pytest.raises(InputError):
        tokenize(long, context_length)
    cut = tokenize(["cat", long], context_length, truncate=True)
    assert torch.equal(cut[0], tokenize("cat", context_length)[0])
    assert cut[1].tolist() == [START, *ours.encode(long)[:words], END]


def test_too_long_text_is_named():
    with pytest.raises(InputError, match="text 1 has 102 tokens, where 77 fit: 'cat cat "):
        tokenize(["a dog", "cat " * 100])
    with pytest.raises(InputError) as caught:
        tokenize("x\n" * 100_000)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("wrong", [None, 3, b"a dog", ["a dog"], float("nan")])
def test_a_text_that_is_no_string_is_named(wrong):
    with pytest.raises(InputError, match=f"text 1 is {type(wrong).__name__}, not a string"):
        tokenize(["a dog", wrong])
