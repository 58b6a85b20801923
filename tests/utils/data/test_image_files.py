"""Which files of a folder are images."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from models.errors import InputError
from utils.data.image_files import find_images


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
    with pytest.raises(InputError, match=r"2 photographs, .* needs pip install pillow-heif"):
        find_images(tmp_path)
