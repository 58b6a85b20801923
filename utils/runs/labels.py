"""Labels for a first zero-shot answer, which captions suggest."""

import re
from collections import Counter

WORDS, LETTERS = 6, 40  # of a suggested label: fits every context
# A noun: in English at most three words after an article and before one of these words, in Chinese
# between 的 and 在 or a punctuation mark.
AFTER_ARTICLE = re.compile(
    r"\ban? (?:[a-z-]+ ){0,3}?((?!(?:each|her|him|one|other|that|them|this)\b)"
    r"[a-z]{3,}(?<![a-z]{3}ing))"
    r"(?=\s*(?:\.|$)| (?:at|from|in|is|near|of|on|that|who|with|[a-z]{3,}ing)\b)"
)
BEFORE_PLACE = re.compile(r"的([^\W\da-z的在是和]{1,4})(?=在|\W|$)")


def labels_to_try(captions: list[list[str]]) -> tuple[str, str]:
    """The noun that is said of the first image far more often than of all, or else the start of
    its shortest caption; and the most frequent one of the others that its captions lack."""
    by_image = [Counter(noun for text in texts for noun in _nouns(text)) for texts in captions]
    of_all = sum(by_image, Counter())
    nouns = [
        max(own, key=lambda n: (own[n] / len(texts) - of_all[n] / of_all.total(), n), default="")
        for own, texts in zip(by_image, captions, strict=True)
    ]
    said = " ".join(captions[0]).lower()
    starts = (" ".join(caption.lower().split()[:WORDS]) for caption in captions[0])
    texts = {start[:LETTERS].rstrip(" .") for start in starts if start[:1].isalnum()}
    shortest = min(texts, key=lambda text: (len(text), text), default="a photo")
    others = Counter(noun for noun in nouns if noun and noun.split()[-1] not in said)
    return nouns[0] or shortest, max(others, key=others.get, default="something else")


def _nouns(caption: str) -> set[str]:
    """The nouns of a caption, as far as the words around them tell."""
    english = (noun for noun in AFTER_ARTICLE.findall(caption.lower()) if noun[-1] != "s")
    nouns = {f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in english}
    return nouns | {*BEFORE_PLACE.findall(caption)}
