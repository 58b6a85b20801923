"""Finding the images of a folder; checking all images of a data set before training."""

import io
import json
import shutil
import struct
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flickr8k.render_demo import render_demo
from models.errors import InputError
from models.preprocess import open_image
from utils import Flickr8kDataset
from utils.data import image_batches
from utils.data.image_files import check_images, check_splits, find_images


def image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(file)


def test_images_are_found_in_all_folders_that_are_not_hidden(tmp_path):
    names = ["b/2.JPG", "a.png", "b/c/3.webp", "图片/一.bmp"]
    for name in [*names, ".hidden.png", ".cache/x.png", "b/.thumbnails/y.png"]:
        image(tmp_path / name)
    for other in ("notes.txt", "drawing.eps", "table.h5", "film.mpg", "png", "b/list.json"):
        (tmp_path / other).touch()
    assert find_images(tmp_path) == sorted(map(Path, names))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_links_are_followed_but_in_no_circle(tmp_path):
    image(tmp_path / "photos" / "a" / "1.png")
    image(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos" / "a")
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "file.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    found = find_images(tmp_path / "photos")
    assert found == [Path("a/1.png"), Path("file.png"), Path("linked/2.png")]


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=f"{tmp_path.name}: there are no images in it"):
        find_images(tmp_path)


def test_photographs_that_need_a_package_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "EXTENSION", {".jpg": "JPEG"})
    image(tmp_path / "a.jpg")
    (tmp_path / "2.HEIC").touch()
    (tmp_path / "3.avif").touch()
    assert find_images(tmp_path) == [Path("a.jpg")]
    said = capsys.readouterr().out
    assert "2 photographs, such as 2.HEIC, " in said and "pip install pillow-heif" in said
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"2 photographs, .* need pip install pillow-heif"):
        find_images(tmp_path)


# All bad images are named, and none ends the check


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(mode: str, size: tuple[int, int] = (24, 16)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


PHOTO = encoded(noise("RGB"), "jpeg")
BITMAP = encoded(noise("RGB"), "bmp")
TURNED = Image.Exif()
TURNED[0x0112] = 6
GOOD = {
    "photo.jpg": PHOTO,
    "a photo 照片.jpg": PHOTO,
    "webp.jpg": encoded(noise("RGB"), "webp"),
    "png.jpg": encoded(noise("RGB"), "png"),
    "cmyk.jpg": encoded(noise("CMYK"), "jpeg"),
    "grey.png": encoded(noise("L"), "png"),
    "16-bit.png": encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "png"),
    "palette.png": encoded(noise("P"), "png", transparency=b"\0\x80"),
    "animated.gif": encoded(noise("P"), "gif", save_all=True, append_images=[noise("L")]),
    "turned.jpg": encoded(noise("RGB"), "jpeg", exif=TURNED),
    "1x1.png": encoded(noise("RGB", (1, 1)), "png"),
    "wide.png": encoded(noise("RGB", (10_000, 10)), "png"),
}
BAD = {
    "truncated.jpg": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"a dog", "not an image"),
    "page.jpg": (b"<html>404</html>", "web page"),
    "bomb.bmp": (BITMAP[:18] + struct.pack("<II", 1 << 18, 1 << 18) + BITMAP[26:], "bomb"),
    "drawing.jpg": (encoded(noise("RGB"), "eps"), "EPS is not read"),
    "missing.jpg": (None, "no such image file"),
    "folder.jpg": (None, "no such image file"),
}


def data_set(root: Path, names: list[str]) -> Flickr8kDataset:
    entries = [{"image": f"images\\{name}", "caption": "a dog"} for name in names]
    (root / "en_train.json").write_text(json.dumps(entries), encoding="utf-8")
    (root / "images").mkdir(exist_ok=True)
    for name in names:
        (root / "images" / name).write_bytes(PHOTO)
    return Flickr8kDataset(root, 8)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_bad_image_is_told_once_in_order_and_no_good_one(tmp_path, num_workers):
    names = [*GOOD, *BAD]
    np.random.default_rng(num_workers).shuffle(names)
    dataset = data_set(tmp_path, names)
    for name in names:
        file = tmp_path / "images" / name
        content = GOOD.get(name) or BAD[name][0]
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    (tmp_path / "images" / "folder.jpg").mkdir()

    problems, plain = check_images(dataset.image, num_workers)
    good = {name for name in names if name in GOOD}
    assert {Path(path).name for path in plain} == good & {"16-bit.png", "1x1.png"}
    bad = [name for name in names if name in BAD]
    assert len(problems) == len(bad)
    for name, problem in zip(bad, problems, strict=True):
        assert problem.startswith(f"{tmp_path / 'images' / name}: ")
        assert BAD[name][1] in problem
        assert len(problem.splitlines()) == 1


def test_truncation_is_found_at_any_place_of_the_data(tmp_path):
    """A header alone can be read: all pixels have to be."""
    whole = encoded(noise("RGB", (200, 100)), "jpeg")
    names = [f"{percent}.jpg" for percent in range(5, 100, 10)]
    dataset = data_set(tmp_path, names)
    for name in names:
        file = tmp_path / "images" / name
        file.write_bytes(whole[: len(whole) * int(name.removesuffix(".jpg")) // 100])
    assert len(check_images(dataset.image)[0]) == len(names)


def test_images_may_be_on_another_disk(tmp_path):
    """The image folder is a link, and so may be the data folder and single images."""
    names = ["1.jpg", "2.jpg"]
    data_set(tmp_path, names)
    (tmp_path / "images").rename(tmp_path / "other disk")
    try:
        (tmp_path / "images").symlink_to(tmp_path / "other disk", target_is_directory=True)
        (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
        (tmp_path / "other disk" / "2.jpg").unlink()
        (tmp_path / "other disk" / "2.jpg").symlink_to("1.jpg")
    except OSError:
        pytest.skip("needs the right to make links")
    for root in (tmp_path, tmp_path / "link"):
        dataset = Flickr8kDataset(root, 8)
        assert [Path(image).name for image in dataset.image] == names
        assert check_images(dataset.image)[0] == []
        assert dataset[1][0].shape == (3, 8, 8)


def test_bad_images_of_the_test_split_are_found_before_training(tmp_path, capsys):
    """Its scores come last, when a broken image would cost the whole run's wait."""
    for name in ("1", "2", "3"):
        (tmp_path / name).write_bytes(PHOTO if name != "3" else b"none")
    one, two, broken = (str(tmp_path / name) for name in ("1", "2", "3"))
    check_splits(splits([one, broken], [two]), 0)
    assert "warning" not in capsys.readouterr().out
    for images, train_too in (([one], [two], [broken]), False), (([one, broken], [two]), True):
        with pytest.raises(InputError, match=r"1 images cannot be read:\n.*not an image"):
            check_splits(splits(*images), 0, train_too)


def test_images_in_two_splits_are_counted_and_named(tmp_path, capsys):
    names = [str(tmp_path / f"{number}.jpg") for number in range(6)]
    for name in names:
        Path(name).write_bytes(PHOTO)
    for val, test, told in (
        (names[4:], [], None),
        (names[3:], [], f"1 images are in both training and validation, {names[3]}"),
        (
            [names[5], names[2], names[0]],
            [],
            f"2 images are in both training and validation, {names[0]}, {names[2]}",
        ),
        (
            names[5:],
            names[:4],
            f"4 images are in both training and test, {', '.join(names[:3])} and 1 more",
        ),
    ):
        check_splits(splits(names[:4], val, test), 0)
        printed = capsys.readouterr().out
        assert printed.count("warning") == (told is not None)
        assert told is None or f"warning: {told}: scores on them" in printed


def test_pictures_of_one_colour_are_named_in_one_line(tmp_path, capsys):
    """White ones too, of which nothing shows what was meant; not one with a spot in its corner."""
    names = [f"{number}.png" for number in range(8)]
    dataset = data_set(tmp_path, names)
    for number, name in enumerate(names):
        picture = np.full((9, 9, 3), 30 * number, np.uint8)
        picture[-3:, -3:, 1] += 40 * (number >= 5)
        Image.fromarray(picture).save(tmp_path / "images" / name)
    check_splits({"train": dataset, "val": dataset}, 0, train_too=True)
    (line,) = [ln for ln in capsys.readouterr().out.splitlines() if "one colour" in ln]
    told = ", ".join(str(tmp_path / "images" / name) for name in names[:3])
    assert line == f"warning: 5 pictures are read as of one colour, {told} and 2 more"


def splits(*images: list[str]) -> dict[str, SimpleNamespace]:
    """Sets of these paths, of which none is cached."""
    sets = (SimpleNamespace(image=paths, cached=None, unreadable={}) for paths in images)
    return dict(zip(("train", "val", "test"), sets, strict=False))


@pytest.mark.parametrize("broken", [(), ("val_0002",), ("val_0001", "train_0003", "test_0000")])
def test_the_cache_decodes_each_image_once_and_finds_what_a_check_finds(
    tmp_path, monkeypatch, broken
):
    root = render_demo(tmp_path / "data", n_train=5, n_val=4)
    shutil.copy(root / "en_train.json", root / "en_test.json")  # other images, below
    for image in (root / "images").glob("train_*"):
        shutil.copy(image, image.with_name(image.name.replace("train", "test")))
    names = (root / "en_test.json").read_text("utf-8").replace("train_", "test_")
    (root / "en_test.json").write_text(names, "utf-8")
    for name in broken:
        (root / "images" / f"{name}.png").write_bytes(b"none")
    opened = Counter()
    monkeypatch.setattr(image_batches, "open_image", partial(count_opened, opened))
    checked = outcome(root, cached=False)
    assert len(opened) == 14 and set(opened.values()) == {1}
    opened.clear()
    assert outcome(root, cached=True) == checked
    decoded = {path: times for path, times in opened.items() if Path(path).stem not in broken}
    assert len(decoded) == 14 - len(broken)
    # What stands in the place of a broken image is decoded for that once more.
    assert sum(decoded.values()) == 14 and (broken or set(decoded.values()) == {1})
    opened.clear()
    assert outcome(root, cached=True) == checked
    assert not opened  # the cache keeps what was wrong


def outcome(root: Path, cached: bool) -> str:
    """What `check_splits` finds wrong with all images of a data set."""
    sets = {name: Flickr8kDataset(root, 8, split=name) for name in ("train", "val", "test")}
    for dataset in sets.values() if cached else ():
        dataset.cache()
    try:
        check_splits(sets, 0, train_too=True)
    except InputError as error:
        return str(error)
    return "nothing"


def count_opened(opened: Counter, path: str, *content: bytes) -> Image.Image:
    opened[path] += 1
    return open_image(path, *content)
