"""Preprocessing compared with torchvision and open_clip, and all kinds of image files."""

import contextlib
import io
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import BmpImagePlugin, EpsImagePlugin, ExifTags, Image
from script_runs import ROOT
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from models.errors import InputError
from models.preprocess import Preprocess, normalize, open_image

SHARED = ROOT.parent / "shared"


def torchvision_pixels(side: int) -> Compose:
    return Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side), PILToTensor()])


def open_clip_transform(side: int) -> Compose:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    return open_clip.image_transform(side, is_train=False, mean=mean, std=std)


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --- pixels and normalisation ---------------------------------------------------------------------

sizes = st.integers(1, 700)


@settings(max_examples=150)
@given(width=sizes, height=sizes, side=st.sampled_from([31, 64, 224]))
@example(width=500, height=375, side=224)
@example(width=224, height=224, side=224)
@example(width=1, height=1, side=224)
@example(width=3, height=700 // 3, side=64)
@example(width=100, height=1, side=31)
@example(width=1, height=100, side=31)
@example(width=427, height=640, side=288)
@example(width=375, height=500, side=336)
def test_pixels_equal_torchvision(width, height, side):
    image = Image.fromarray(noise(width, height))
    assert torch.equal(Preprocess(side).resize_and_crop(image), torchvision_pixels(side)(image))


@settings(max_examples=25)
@given(width=sizes, height=sizes, mode=st.sampled_from(["RGB", "L"]))
def test_preprocess_equals_open_clip(width, height, mode):
    image = Image.fromarray(noise(width, height)).convert(mode)
    assert torch.equal(Preprocess(224)(image), open_clip_transform(224)(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_every_way_to_resize_is_open_clips(interpolation, mode):
    how = {"interpolation": interpolation, "resize_mode": mode}
    image = Image.fromarray(noise(90, 70))
    expected = image_transform_v2(PreprocessCfg(size=64, **how), is_train=False)(image)
    assert torch.equal(Preprocess(64, **how)(image), expected)


def test_preprocess_equals_open_clip_on_opaque_rgba():
    image = Image.fromarray(noise(90, 70)).convert("RGBA")
    assert torch.equal(Preprocess(64)(image), open_clip_transform(64)(image))


def test_preprocess_equals_open_clip_on_flickr8k():
    files = sorted((SHARED / "flickr8k_original").rglob("*.jpg"))[:20]
    if not files:
        pytest.skip("needs Flickr8k")
    for file in files:
        with Image.open(file) as image:
            expected = open_clip_transform(224)(image)
        assert torch.equal(Preprocess(224)(open_image(file)), expected)


def test_normalize_in_float64():
    images = torch.from_numpy(noise(8, 8)).permute(2, 0, 1).expand(2, 3, 8, 8)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(
        std
    ).double().view(3, 1, 1)
    result = normalize(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(normalize(images[0]), result[0])


def test_preprocess_repr_and_equality():
    assert repr(Preprocess(224)).startswith("Preprocess(side=224, mean=(0.48145466, ")
    assert Preprocess(224) == Preprocess(224) != Preprocess(336)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def picture() -> np.ndarray:
    """12 pixels wide and 8 high: on the left red above green, on the right blue above yellow."""
    image = np.zeros((8, 12, 3), np.uint8)
    image[:4, :6], image[4:, :6] = (255, 0, 0), (0, 255, 0)
    image[:4, 6:], image[4:, 6:] = (0, 0, 255), (255, 255, 0)
    return image


def opened(tmp_path: Path, content: bytes, name: str = "image.jpg") -> np.ndarray:
    """The RGB image, as an array, that `open_image` reads from a file with this content."""
    file = tmp_path / name
    file.write_bytes(content)
    image = open_image(file)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["png", "webp", "bmp", "tiff", "gif", "ppm"])
def test_format_is_recognised_by_content(tmp_path, picture, format):
    options = {"lossless": True} if format == "webp" else {}
    content = encoded(Image.fromarray(picture), format, **options)
    assert (opened(tmp_path, content, "image.jpg") == picture).all()


def test_grey(tmp_path):
    grey = noise(12, 8, channels=1)
    content = encoded(Image.fromarray(grey), "png")
    assert (opened(tmp_path, content) == grey[..., None]).all()


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, format):
    grey = np.linspace(0, 65535, 96).astype(np.uint16).reshape(8, 12)
    result = opened(tmp_path, encoded(Image.fromarray(grey), format))
    assert np.abs(result - grey[..., None] / 257).max() <= 1


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_keeps_its_upper_8_bits(tmp_path, colour_type, channels):
    """RGB, grey with alpha, and RGB with alpha. Pillow cannot write such a PNG, so it is built here
    as section 5 of the PNG specification says."""
    samples = np.random.default_rng(0).integers(0, 65536, (8, 12, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", 12, 8, 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    colours = samples[..., :3] if channels > 2 else samples[..., :1]
    assert (opened(tmp_path, content) == colours >> 8).all()


GREY = np.arange(256).reshape(8, 32)  # each value of 8 bits once
WIDER = {"16 bits": 0x101, "24 bits": 0x10101}  # times GREY: to their largest


@pytest.mark.parametrize(
    "values",
    [
        *(GREY.astype(kind) for kind in (np.uint16, np.int32, np.float32)),
        *((GREY * WIDER["16 bits"]).astype(kind) for kind in (np.uint16, np.int32, np.float32)),
        *((GREY * WIDER["24 bits"]).astype(kind) for kind in (np.int32, np.float32)),
        (GREY / 255).astype(np.float32),
    ],
    ids=lambda values: f"{values.dtype}-{values.max():.0f}",
)
def test_grey_of_integers_and_floats_has_the_range_that_holds_its_largest_value(tmp_path, values):
    content = encoded(Image.fromarray(values), "tiff")
    assert (opened(tmp_path, content) == GREY[..., None]).all()


def test_grey_outside_its_range_and_no_numbers(tmp_path):
    """A little over 1 still is white among floats from 0 to 1, as resampling makes it."""
    values = np.array([[np.nan, -np.inf, -0.5, 0, 0.2, 1.01, np.inf]], np.float32)
    result = opened(tmp_path, encoded(Image.fromarray(values), "tiff"))
    assert result[0, :, 0].tolist() == [0, 0, 0, 0, 51, 255, 255]
    nothing = np.full((2, 2), np.nan, np.float32)
    assert not opened(tmp_path, encoded(Image.fromarray(nothing), "tiff")).any()
    dark = np.array([[-5, 0, 255]], np.int32)
    assert opened(tmp_path, encoded(Image.fromarray(dark), "tiff"))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("size", [(1, 1), (10_000, 10), (10, 10_000)])
def test_extreme_sizes(tmp_path, size):
    content = encoded(Image.new("RGB", size, (10, 20, 30)), "png")
    assert opened(tmp_path, content).shape == (*size[::-1], 3)
    values = (
        Preprocess(32).resize_and_crop(open_image(tmp_path / "image.jpg")).flatten(1).unique(dim=1)
    )
    assert values.flatten().tolist() == [10, 20, 30]


def test_cmyk(tmp_path):
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    red, green, blue = opened(tmp_path, encoded(cyan, "jpeg", quality=95)).mean((0, 1))
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("mode", ["RGBA", "P"])
@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped(tmp_path, picture, mode):
    image = Image.fromarray(picture)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise(12, 8, channels=1)))
        content = encoded(image, "png")
    else:
        image = image.quantize(4, dither=Image.Dither.NONE)
        content = encoded(image, "png", transparency=bytes([0, 100, 200, 255]))
    assert (opened(tmp_path, content) == picture).all()


def test_animation_gives_its_first_frame(tmp_path, picture):
    first, second = Image.fromarray(picture), Image.fromarray(255 - picture)
    content = encoded(first, "gif", save_all=True, append_images=[second])
    assert (opened(tmp_path, content) == picture).all()


# How an upright picture is stored, for each of the eight orientations. Section 4.6.4 of EXIF 2.32
# defines them by the sides of the upright picture that become row 0 and column 0.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[:, ::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["png", "webp", "tiff"])
def test_exif_orientation_is_applied_once(tmp_path, picture, orientation, format):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](picture)))
    options = {"lossless": True} if format == "webp" else {}
    content = encoded(stored, format, exif=exif, **options)
    assert (opened(tmp_path, content) == picture).all()
    with Image.open(io.BytesIO(content)) as image:
        once = Preprocess(8)(image)
    assert torch.equal(once, Preprocess(8)(Image.fromarray(picture)))
    assert torch.equal(once, Preprocess(8)(open_image(tmp_path / "image.jpg")))


def test_broken_exif_is_ignored(tmp_path, picture):
    content = encoded(Image.fromarray(picture), "png", exif=b"Exif\0\0nonsense")
    assert (opened(tmp_path, content) == picture).all()


def test_heic_is_read_where_its_package_is(tmp_path, picture):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    file = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(picture)).save(file, quality=-1)  # lossless
    assert np.abs(np.asarray(open_image(file)).astype(int) - picture).max() <= 2


def test_tilde_is_the_home_folder(tmp_path, picture, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(picture), "png"))
    assert (np.asarray(open_image("~/a.png")) == picture).all()


# --- files that are no images ---------------------------------------------------------------------


def refusal(file: Path) -> str:
    """The message with which `open_image` refuses a file: one line that begins with its name."""
    with pytest.raises(InputError) as caught:
        open_image(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_missing_file_folder_and_impossible_names(tmp_path):
    assert "no such image file" in refusal(tmp_path / "a.jpg")
    assert refusal(tmp_path).endswith("no such image file")
    with pytest.raises(InputError):
        open_image("a\0.jpg")


def test_a_name_without_its_ending_is_told_which_file_is_there(tmp_path):
    for name in ("dog.jpg", "Cat.JPG", "a.b.png"):
        (tmp_path / name).touch()
    for name, there in (("dog", "dog.jpg"), ("cat.jpg", "Cat.JPG"), ("a.b", "a.b.png")):
        assert f"(there is {there})" in refusal(tmp_path / name)
    assert "there is" not in refusal(tmp_path / "do")
    assert "there is" not in refusal(tmp_path / "absent" / "dog")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("IMG_1.HEIC", "pip install pillow-heif"),
        ("a.avif", "pip install --upgrade Pillow"),
        ("a.jpg", "but another file"),
    ],
)
def test_a_format_that_pillow_may_lack_is_named_with_its_package(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"no picture")
    assert remedy in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE html><title>404</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        *((content, "another file") for content in (b"hello", b"\xff\xd8\xff", b"{}" * 1000)),
    ],
)
def test_a_file_that_is_no_image_is_described(tmp_path, content, what):
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    assert "not an image" in refusal(file) and what in refusal(file)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for Ghostscript")
def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for such a file, even if its name ends with .jpg."""
    ghostscript, trace = tmp_path / "gs", tmp_path / "trace"
    ghostscript.write_text(f"#!/bin/sh\necho run >> '{trace}'\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    file = tmp_path / "image.jpg"
    file.write_bytes(encoded(Image.new("RGB", (4, 4)), "eps"))
    with Image.open(file) as image, contextlib.suppress(Exception):
        image.load()
    assert trace.exists()
    trace.unlink()
    assert "EPS is not read" in refusal(file)
    assert not trace.exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError("one\ntwo"), SyntaxError("\tbroken\n")])
def test_whatever_a_decoder_raises_is_one_line_with_a_reason(tmp_path, monkeypatch, error):
    def load(image):
        raise error

    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    file = tmp_path / "image.jpg"
    file.write_bytes(encoded(Image.new("RGB", (4, 4)), "bmp"))
    assert re.search(r"not a readable image \(\w.*\)$", refusal(file))


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "tiff", "bmp"])
def test_truncated_image(tmp_path, format):
    content = encoded(Image.fromarray(noise(64, 64)), format)
    file = tmp_path / "image.jpg"
    file.write_bytes(content[: len(content) * 2 // 3])
    assert "not a readable image" in refusal(file)


def test_decompression_bomb(tmp_path):
    """A small file whose header says that it has 2^36 pixels."""
    content = encoded(Image.new("1", (1, 1)), "bmp")
    side = (1 << 18).to_bytes(4, "little")
    file = tmp_path / "image.bmp"
    file.write_bytes(content[:18] + side + side + content[26:])
    assert "bomb" in refusal(file)


EXIF_ORIENTATION_6 = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
UNDAMAGED = {
    format: encoded(Image.fromarray(noise(20, 10)), format, exif=EXIF_ORIENTATION_6)
    for format in ("jpeg", "png", "gif", "webp", "tiff", "bmp")
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    format=st.sampled_from(sorted(UNDAMAGED)),
    share=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    header=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tmp_path, format, share, changes, header):
    content = bytearray(UNDAMAGED[format])
    reach = min(64, len(content)) if header else len(content)
    for place, value in changes:
        content[int(place * (reach - 1))] = value
    if len(changes) % 2:
        del content[int(share * len(content)) :]
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    try:
        image = open_image(file)
    except InputError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
    else:
        assert image.mode == "RGB"
