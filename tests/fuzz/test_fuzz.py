"""Any bytes, any text, any scores: a result that is right, or the project's own error.

The files are mutations, with a fixed seed, of valid ones: a short version of `fuzz/fuzz.py`.
"""

import random

import numpy as np
import pytest
from definitions import by_definition
from fuzz import targets
from hypothesis import given, settings
from hypothesis import strategies as st

from models import tokenize
from models.errors import InputError
from models.tokens import clip_tokenizer
from utils.metric import compute_metrics

MUTANTS = 3000
TELLING = [
    b"\0",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x80",
    b".",
    b"q",
    b"h",
    b'"',
    b"[",
    b"}",
    b"0",
]


def mutate(seeds: list[bytes], chance: random.Random) -> bytes:
    """One seed after a few cuts, repeats, bytes changed, and pieces of others put in."""
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice([0, 1, 4, 16, 100]))
        other = chance.choice(seeds)
        piece = chance.randrange(len(other))
        data[start:end] = chance.choice(
            [
                b"",
                data[start:end] * 2,
                chance.randbytes(end - start),
                chance.choice(TELLING),
                other[piece : piece + 50],
            ]
        )
    return bytes(data if chance.random() < 0.9 else data[: chance.randrange(len(data) + 1)])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["weights", "annotations"])
def test_mutated_files(tmp_path, name):
    target, seeds = targets.TARGETS[name]
    seeds, chance = seeds(), random.Random(0)
    path = tmp_path / "file"
    for data in [*seeds, *(mutate(seeds, chance) for _ in range(MUTANTS))]:
        try:
            target(data, path)
        except Exception as error:
            raise AssertionError(f"{name}: {data!r}") from error


@settings(max_examples=300)
@given(st.lists(st.text(), max_size=4), st.integers(2, 77))
def test_any_texts_are_tokens_between_start_and_end(texts, length):
    bpe = clip_tokenizer()
    rows = tokenize(texts, length, truncate=True)
    assert rows.shape == (len(texts), length)
    for text, row in zip(texts, rows.tolist(), strict=True):
        ids = bpe.encode(text)[: length - 2]
        assert row == [bpe.start_of_text, *ids, bpe.end_of_text] + [0] * (length - 2 - len(ids))


numbers = st.sampled_from([0.0, -0.0, 1.0, -np.inf, np.inf, 1e-45, 3e38])


@st.composite
def retrieval_problems(draw):
    """Scores and ground truths, right, or one of them wrong in any way."""
    sizes = images, texts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from([np.float32, np.float64]))
    cells = st.lists(numbers, min_size=images * texts, max_size=images * texts)
    scores = [np.array(draw(cells), dtype=kind).reshape(images, texts) for _ in "ab"]
    truths = []
    for queries, gallery in (sizes, sizes[::-1]):
        right = st.integers(0, gallery - 1)
        of_query = right | st.lists(right, min_size=1, unique=True)
        truths.append({query: draw(of_query) for query in range(queries)})
    match draw(st.sampled_from(["nothing", "nothing", "score", "truth"])):
        case "score":
            draw(st.sampled_from(scores)).flat[draw(st.integers(0, images * texts - 1))] = np.nan
        case "truth":
            wrong = st.integers(-2, 9) | st.lists(st.integers(-2, 9), max_size=3, unique=True)
            draw(st.sampled_from(truths))[0] = draw(wrong)
    return scores[0], truths[0], scores[1].T, truths[1]


def is_usable(scores: np.ndarray, truth: dict) -> bool:
    queries, gallery = scores.shape
    lists = [np.atleast_1d(truth.get(query, [])) for query in range(queries)]
    in_range = all(len(t) and t.min() >= 0 and t.max() < gallery for t in lists)
    return in_range and not np.isnan(scores).any()


@settings(max_examples=500)
@given(retrieval_problems())
def test_any_scores_are_measured_by_definition_or_refused(problem):
    k_values = (1, 2, 50)
    if not (is_usable(*problem[:2]) and is_usable(*problem[2:])):
        with pytest.raises(InputError):
            compute_metrics(*problem, k_values)
        return
    metrics = compute_metrics(*problem, k_values)
    assert metrics["i2t"] == pytest.approx(by_definition(*problem[:2], k_values))
    assert metrics["t2i"] == pytest.approx(by_definition(*problem[2:], k_values))
