"""A model is scored on a set: positives by the texts, and the loss of training."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from definitions import loss_by_definition
from PIL import Image

from models import preprocess
from utils import Flickr8kDataset
from utils.machine.precision import Precision
from utils.retrieval.evaluation import Evaluator

SCALE = torch.tensor(0.5)  # of a judge's logits, as a logarithm


class Judge:
    """A model that is never wrong about a data set in which image i is of the colour `(i, i, i)`:
    the features of a text tell which images have it, those of an image which one it is."""

    def __init__(self, dataset):
        self.embed_dim, self.device = len(dataset), torch.device("cpu")
        self.logit_scale, self.preprocess = SCALE, preprocess.Preprocess(1)
        self.logit_bias, self.projections = None, {}
        self.having = {}
        for image, captions in dataset.own_captions.items():
            for row in dataset.tokens[captions].numpy():
                feature = self.having.setdefault(row.tobytes(), torch.zeros(len(dataset)))
                feature[image] = 1

    def eval(self):
        pass

    def encode_image(self, images, normalize=True):
        pixels = torch.arange(self.embed_dim).byte().expand(1, 3, 1, -1)
        colours = preprocess.normalize(pixels)[0, 0, 0]
        return torch.stack([(colours == image[0, 0, 0]).float() for image in images])

    def encode_text(self, tokens, normalize=True):
        return F.normalize(torch.stack([self.having[row.tobytes()] for row in tokens.numpy()]))


def judged(folder, captions, batch_size=5, captions_per_image=1, plain_protocol=False):
    """(scores, loss) that this model gets for images with these captions."""
    entries = []
    for i, own in enumerate(captions):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": own})
    (folder / "en_val.json").write_text(json.dumps(entries), "utf-8")
    dataset = Flickr8kDataset(folder, 8, is_train=False, plain_protocol=plain_protocol)
    precision = Precision(torch.device("cpu"), use_amp=False)
    loader = SimpleNamespace(
        batch_size=batch_size, num_workers=0, captions_per_image=captions_per_image
    )
    return Evaluator(loader, precision).score(Judge(dataset), dataset)


def test_a_model_that_is_never_wrong_gets_everything_from_two_classes_as_captions(tmp_path):
    """Of forty images twenty share each caption; ranks are those of the first positive. When a
    caption is right for its own image alone, the nineteen that are equal count against it."""
    captions = [["a dog", "a cat"][i % 2] for i in range(40)]
    scores, _ = judged(tmp_path, captions)
    for way in (scores.i2t, scores.t2i):
        assert way.recall == way.map_at == {1: 100, 5: 100, 10: 100}
        assert way.median_rank == way.mean_rank == 1
    scores, _ = judged(tmp_path, captions, plain_protocol=True)
    assert scores.i2t.recall == {1: 0, 5: 0, 10: 0}
    assert scores.i2t.median_rank == scores.t2i.median_rank == 20


def test_texts_that_are_equal_only_once_they_are_cut_are_no_positives_of_others(tmp_path):
    """Two of four texts look the same to the best of models: with ties against it, it finds the
    images of the other two alone, and none of the texts that look the same stands first."""
    start = "dog " * 90
    captions = [["a cat"], [f"{start}a"], [f"{start}b"], ["a bird"]]
    scores, _ = judged(tmp_path, captions)
    for way in (scores.i2t, scores.t2i):
        assert way.recall[1] == 50 and way.recall[5] == 100


@pytest.mark.parametrize("k, batch_size", [(1, 5), (2, 4), (3, 7), (2, 100)])
def test_validation_loss_is_that_of_training_for_the_same_captions_and_batches(
    tmp_path, k, batch_size
):
    """All images count, also those of the last, smaller batch; an image with few captions brings
    them again. A caption is no negative of the images whose further captions say the same."""
    captions = [[f"bird {i}{c}" for c in range(1 + i % 3)] for i in range(11)]
    captions[3][0] = captions[4][1] = captions[2][2] = captions[0][0]
    _, found = judged(tmp_path, captions, batch_size, captions_per_image=k)
    number = {text: i for i, text in enumerate(text for own in captions for text in own)}
    expected = 0
    for start in range(0, 11, batch_size):
        rows = list(range(start, min(start + batch_size, 11)))
        drawn = [[captions[i][c % len(captions[i])] for c in range(k)] for i in rows]
        of_images = torch.eye(11, dtype=torch.float64)[rows]
        of_texts = torch.tensor([[t in own for own in captions] for d in drawn for t in d]).double()
        right = [d + captions[i] * 3 for i, d in zip(rows, drawn, strict=True)]
        texts = torch.tensor([[number[text] for text in row[: k + 3]] for row in right])
        loss = loss_by_definition(of_images, of_texts, SCALE.double(), texts)
        expected += len(rows) * loss.item() / 11
    assert found == pytest.approx(expected, rel=1e-5)
