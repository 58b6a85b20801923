"""Features of a whole set."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models import CLIP
from models.weights.registry import CONFIGS
from utils.retrieval.encode import encode_images, encode_texts


class Pictures(SimpleNamespace):
    """A data set in memory."""

    def __len__(self):
        return len(self.pixels)

    def batches(self, batches, num_workers):
        return (self.pixels[rows] for rows in batches)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_features_are_those_of_evaluation_whatever_mode_the_model_is_in(batch_size):
    """In training a ResNet's batch norms mix the images of a batch, and change with each."""
    config = replace(CONFIGS["RN50"], image_resolution=32, vision_layers=(1, 1, 1, 1),
                     vision_width=8, transformer_layers=1, vocab_size=100)  # fmt: skip
    torch.manual_seed(0)
    model = CLIP(config).initialize()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    pixels = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[1, 5, 99], [2, 99, 0]])
    model.eval()
    with torch.no_grad():
        images = F.normalize(model.encode_image(model.preprocess.normalize(pixels)), dim=-1)
        texts = F.normalize(model.encode_text(tokens), dim=-1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for encode, given, expected in (
        (encode_images, (Pictures(pixels=pixels, unreadable={}), batch_size, 0), images),
        (encode_texts, (tokens,), texts),
    ):
        model.train()
        torch.testing.assert_close(encode(model, *given), expected, atol=1e-5, rtol=0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
