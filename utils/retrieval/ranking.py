"""Captions ranked for one image, and a picture of the ranking."""

import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.clip import CLIP
from models.weights.file_kind import one_line
from utils.runs.files import save_figure

# Captions can be Chinese: each character is drawn with the first of these fonts that has it.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
         "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei"]  # fmt: skip


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


def draw_ranking(image: Image.Image, ranked: list[Ranked], path: Path) -> None:
    """Write a picture to `path`: the image, and beside it each caption with a bar for its
    probability."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in installed]
    figure = Figure(figsize=(11, 4), layout="constrained")
    picture, chart = figure.subplots(1, 2, width_ratios=[1, 1.4])
    picture.imshow(image)
    picture.axis("off")
    rows = range(len(ranked))
    chart.barh(rows, [r.probability for r in ranked], height=0.3, color="tab:blue", alpha=0.6)
    for row, (caption, probability, similarity) in enumerate(ranked):
        caption = one_line(caption)  # control characters and whole pages cannot be drawn
        text = textwrap.fill(f"{caption}  ({probability:.1%}, similarity {similarity:.3f})", 68)
        chart.text(0, row - 0.22, text, va="bottom", fontfamily=fonts, fontsize=9,
                   parse_math=False)  # fmt: skip
    chart.set(xlim=(0, 1), ylim=(len(ranked) - 0.5, -0.9), yticks=[], xlabel="probability")
    chart.spines[["top", "right", "left"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no installed font has some character
        save_figure(figure, path)
