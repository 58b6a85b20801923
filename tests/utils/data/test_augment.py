"""Random crops against Pillow's resizing of the same boxes; other colours, other words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.tokens import chinese_tokenizer, clip_tokenizer, token_rows
from utils.data.augment import (
    GAIN,
    MIN_AREA,
    OFFSET,
    crop,
    draw_crops,
    draw_recolourings,
    hue_turns,
    recolour,
    reword,
    sample_without_border,
)


def pillow_crop(image: torch.Tensor, side: float, x: float, y: float) -> torch.Tensor:
    """The crop of one image `[3, r, r]`, bilinear, each channel a float picture."""
    r = image.shape[-1]
    left, top = (1 + x - side) / 2 * r, (1 + y - side) / 2 * r
    box = (max(left, 0), max(top, 0), min(left + side * r, r), min(top + side * r, r))
    channels = [Image.fromarray(channel.numpy()) for channel in image]
    resized = [c.resize((r, r), Image.Resampling.BILINEAR, box=box) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in resized]))


def random_images(n: int, r: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, r, r, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), r=st.integers(2, 80), n=st.integers(1, 4))
def test_crop_is_that_of_pillow(seed, r, n):
    images = random_images(n, r)
    crops = draw_crops(n, np.random.default_rng(seed))
    expected = [pillow_crop(i, *c) for i, c in zip(images, crops.tolist(), strict=True)]
    torch.testing.assert_close(crop(images, crops), torch.stack(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("x", "y"), [(0.05, -0.05), (-0.05, 0.05), (0, 0)])
def test_x_moves_right_and_y_moves_down(x, y):
    """In a picture of its own coordinates, a crop's mean is its centre."""
    axis = (torch.arange(40) + 0.5) / 20 - 1
    image = torch.stack([*torch.meshgrid(axis, axis, indexing="xy"), torch.zeros(40, 40)])
    column, row, _ = crop(image[None], torch.tensor([[0.9, x, y]]))[0].mean((1, 2)).tolist()
    assert column == pytest.approx(x, abs=1e-3)
    assert row == pytest.approx(y, abs=1e-3)


def test_whole_image_comes_back():
    images = random_images(2, 224)
    whole = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2, 1)
    torch.testing.assert_close(crop(images, whole), images, atol=1e-3, rtol=0)


@given(seed=st.integers(0, 2**32), n=st.integers(0, 300))
def test_crops_are_large_and_within_the_image(seed, n):
    crops = draw_crops(n, np.random.default_rng(seed))
    assert crops.shape == (n, 3)
    assert crops.dtype == torch.float32
    side, centre = crops[:, :1], crops[:, 1:]
    assert ((side**2 >= 0.9 - 1e-6) & (side <= 1)).all()  # nine tenths of the image
    assert (centre.abs() + side <= 1 + 1e-6).all()


def test_crops_spread_over_what_is_allowed():
    side, x, y = draw_crops(20_000, np.random.default_rng(0)).double().unbind(1)
    x, y = x / (1 - side), y / (1 - side)
    area = (side**2 - MIN_AREA) / (1 - MIN_AREA)
    for values, low in ((area, 0), (x, -1), (y, -1)):
        shares = torch.histc(values, 10, low, 1) / len(values)
        torch.testing.assert_close(shares, torch.full_like(shares, 0.1), atol=0.012, rtol=0)


def test_crops_follow_from_the_seed():
    first, again, other = (draw_crops(9, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_padding_by_the_border_the_crops_are_the_same():
    """What `mps` is given: every place beyond the outermost pixels' centres has their colour."""
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.random((64, 3, 24, 24), dtype=np.float32))
    crops = draw_crops(64, random)
    crops[:2] = torch.tensor([[0.95, 0.05, -0.05], [1.0, 0.0, 0.0]])  # in the corner; whole
    side, x, y = crops[:, :, None, None].unbind(1)
    centres = (2 * torch.arange(24) + 1) / 24 - 1
    grid = torch.stack([(side * centres + x).expand(-1, 24, -1),
                        (side * centres[:, None] + y).expand(-1, -1, 24)], dim=-1)  # fmt: skip
    found = sample_without_border(images, grid)
    assert torch.allclose(found, crop(images, crops), atol=1e-5)


@given(st.lists(st.floats(-7, 7), max_size=4))
def test_hues_are_turned_as_rotations_about_grey_are(angles):
    """Against the exponential of the rotation's generator."""
    x = y = z = 3**-0.5
    generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    turns = torch.from_numpy(hue_turns(np.array(angles, dtype=float)))
    for angle, turn in zip(angles, turns, strict=True):
        torch.testing.assert_close(turn, torch.matrix_exp(angle * generator))


def test_recolourings_are_spread_from_none_to_all_that_is_allowed():
    """Of a grey one's three channels, what is left is their gains and offsets."""
    colours = draw_recolourings(20_000, np.random.default_rng(0)).double()
    assert colours.shape == (20_000, 3, 4)
    offsets = colours[..., 3].flatten()
    # The mean of all turns is that of the channels, of all shares a half.
    expected = torch.eye(3) / 2 + torch.full((3, 3), 1 / 6)
    torch.testing.assert_close(colours[..., :3].mean(dim=0), expected.double(), atol=0.02, rtol=0)
    grey = colours[..., :3].sum(dim=2)  # 1 plus a share of the gain's distance from 1
    assert grey.min() < GAIN[0] + 0.02 and grey.max() > GAIN[1] - 0.02
    assert ((grey > GAIN[0]) & (grey < GAIN[1])).all()
    # The mean of a uniform share's square is a third.
    assert offsets.square().mean().item() == pytest.approx(OFFSET**2 / 3, rel=0.05)
    assert offsets.mean().item() == pytest.approx(0, abs=0.01)
    untouched = (colours[..., :3] - torch.eye(3)).norm(dim=(1, 2)) < 0.05
    assert 0.01 < untouched.double().mean() < 0.06


def test_recolour_mixes_channels():
    images = random_images(3, 5)
    colours = draw_recolourings(3, np.random.default_rng(1))
    mixed = torch.einsum("ncd,ndhw->nchw", colours[..., :3], images) + colours[..., 3:, None]
    torch.testing.assert_close(recolour(images, colours), mixed)


@settings(max_examples=30)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=4), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), chinese_tokenizer()])
def test_other_words_stand_between_the_first_and_the_last_token(tokenizer, texts, seed):
    tokens = token_rows(tokenizer, texts, 12, truncate=True)
    draws = torch.from_numpy(np.random.default_rng(seed).random((len(texts), 25)))
    draws[0, 0] = 0  # of the first text nothing is changed, of the last all
    draws[-1, 0] = 1 if len(texts) > 1 else 0
    found = reword(tokens, draws, tokenizer.words)
    assert found.dtype == tokens.dtype
    for row, old, (share, *_) in zip(found.tolist(), tokens.tolist(), draws.tolist(), strict=True):
        end = old.index(tokenizer.end_of_text)
        assert row[0] == old[0] and row[end:] == old[end:]
        changed = [new for new, before in zip(row[1:end], old[1:end], strict=True) if new != before]
        assert all(new in tokenizer.words for new in changed)
        assert share > 0 or not changed
    if len(texts) > 1:
        end = old.index(tokenizer.end_of_text)
        expected = tokenizer.words.start + (draws[-1, 14 : 13 + end] * len(tokenizer.words)).floor()
        assert row[1:end] == expected.tolist()


def test_the_share_of_other_words_is_uniform_from_none_to_all():
    tokens = torch.full((2000, 77), 7)
    tokens[:, 0], tokens[:, -1] = 49406, 49407
    draws = torch.from_numpy(np.random.default_rng(0).random((2000, 155)))
    found = reword(tokens, draws, clip_tokenizer().words)
    changed = (found != tokens)[:, 1:-1].double().mean(dim=1)
    shares = torch.histc(changed, 5, 0, 1) / 2000
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2), atol=0.05, rtol=0)


@pytest.mark.parametrize("tokenizer", [clip_tokenizer(), chinese_tokenizer()])
def test_words_are_all_tokens_but_the_special_ones(tokenizer):
    special = {tokenizer.start_of_text, tokenizer.end_of_text}
    assert not special & set(tokenizer.words)
    of_text = {i for text in ("一只狗, a dog!", "~龟 [SEP]") for i in tokenizer.encode(text)}
    assert of_text <= set(tokenizer.words)
    known = [tokenizer.decoder[i] for i in tokenizer.words]
    assert not [token for token in known if token.startswith(("[unused", "[CLS", "<|"))]
