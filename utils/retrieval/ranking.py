"""Captions ranked by their similarity to one image."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip import CLIP


class Ranked(NamedTuple):
    caption: str
    probability: float  # softmax over all captions
    similarity: float  # cosine


@torch.inference_mode()
def rank_captions(
    model: CLIP, image: Tensor, captions: list[str], text_features: Tensor
) -> list[Ranked]:
    """The captions, the most similar to `image` first. `image` is preprocessed, `[3, r, r]`;
    `text_features` are the captions' normalised features, `[captions, d]`."""
    image_features = F.normalize(model.encode_image(image[None].to(model.device)), dim=-1)
    similarity = (text_features @ image_features.T).squeeze(1)
    probability = (model.logit_scale.exp() * similarity).softmax(dim=0)
    order = similarity.argsort(descending=True).tolist()
    return [Ranked(captions[i], probability[i].item(), similarity[i].item()) for i in order]
