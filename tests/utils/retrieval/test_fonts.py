"""Fonts for Chinese, with fonts made here, so that it is known which characters they have."""

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.retrieval.plots import fonts_for


def make_font(path, name, characters):
    """A font in which each of the characters is a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    glyphs = [".notdef", *(f"square{i}" for i in range(len(characters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(dict(zip(map(ord, characters), glyphs[1:], strict=True)))
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """A machine with matplotlib's own fonts alone, and a function that installs more."""
    manager = font_manager.fontManager
    own = [font for font in manager.ttflist if "mpl-data" in str(font.fname)]
    monkeypatch.setattr(manager, "ttflist", own)
    files = []
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: files)
    return files.append


def test_a_font_that_was_installed_meanwhile_is_found_and_draws(tmp_path, installed, capsys):
    installed(make_font(tmp_path / "dog.ttf", "SimHei", "狗犬"))
    installed(str(tmp_path / "no font.ttf"))
    found = fonts_for("a dog 狗")
    assert found[1:] == ["SimHei"] and not capsys.readouterr().out
    figure = Figure(figsize=(1, 1), dpi=100)
    figure.text(0.5, 0.5, "狗", fontfamily=found, fontsize=36, ha="center", va="center")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    ink = np.asarray(canvas.buffer_rgba())[..., 0] < 128
    assert 0.9 * 50**2 < ink.sum() < 1.1 * 50**2  # 36 points at 100 dpi are a square of 50 pixels


def test_a_chinese_font_is_asked_for_where_none_is_installed(installed, capsys):
    assert fonts_for("一只狗") == ["DejaVu Sans"]
    (line,) = capsys.readouterr().out.splitlines()
    assert "fonts-noto-cjk" in line
    assert fonts_for("Ein Hund läuft, 10 € für 2 Bälle 👨") == ["DejaVu Sans"]
    assert not capsys.readouterr().out
