"""The labels that a run suggests are nouns of its captions."""

import pytest

from utils.runs.labels import labels_to_try

DOG = ["A brown dog runs .", "A dog is on the grass", "a dog in the snow", "A dog jumping"]
MAN = ["a man in a red shirt", "A man with a ring .", "An old man on a bench ."]
WOMAN = ["a woman with an umbrella", "a dog and a woman", "A young woman is outside"]


@pytest.mark.parametrize(
    "captions, labels",
    [
        ([DOG, WOMAN, MAN, MAN], ["a dog", "a man"]),
        ([MAN, DOG, WOMAN, DOG], ["a man", "a dog"]),
        ([["a brown ring ."] * 2, ["An owl in a tree", "a photo of an owl"]], ["a ring", "an owl"]),
        ([["一只棕色的狗在草地上奔跑", "可爱的狗。"], ["戴帽子的女孩,在笑"]], ["狗", "女孩"]),
        ([["狗"]], ["狗", "something else"]),
        ([["Two children laugh loudly on the grass", "--labels"]],
         ["two children laugh loudly on the", "something else"]),
        ([["..."]], ["a photo", "something else"]),
    ],
)  # fmt: skip
def test_labels_are_nouns_of_the_captions(captions, labels):
    assert labels_to_try(captions) == tuple(labels)
