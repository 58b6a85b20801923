"""Fonts for captions and labels, which can be Chinese, of those that the machine has."""

from contextlib import suppress
from functools import lru_cache

CHINESE = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
           "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "WenQuanYi Zen Hei")  # fmt: skip
WITHOUT_BOXES = "DejaVu Sans"  # matplotlib's own
HOW_TO_INSTALL = (
    "; install a Chinese font, such as Noto Sans CJK (apt install fonts-noto-cjk, "
    "dnf install google-noto-sans-cjk-fonts, or the .otf file into your fonts folder)"
)


def fonts_for(text: str) -> list[str]:
    """The names of fonts that together can draw `text`, for matplotlib, which draws each character
    with the first of them that has it. If the machine has no font for some, a line is printed that
    says which, and what to install."""
    fonts, missing = [WITHOUT_BOXES], _drawable(text) - _characters(WITHOUT_BOXES)
    for name in _candidates() if missing else ():
        if found := missing & _characters(name):
            fonts.append(name)
            missing -= found
        if not missing:
            break
    if missing:
        some = "".join(sorted(missing)[:10])
        remedy = HOW_TO_INSTALL if any("\u4e00" <= c <= "\u9fff" for c in missing) else ""
        print(f"no font here has {some}: the picture shows boxes in their place{remedy}")
    return fonts


def _drawable(text: str) -> set[str]:
    """The characters of a text that a font has to have: spaces and invisible ones need none."""
    return {c for c in text if c.isprintable() and not c.isspace()}


@lru_cache
def _candidates() -> list[str]:
    """The names of the installed fonts, those known for Chinese first."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for file in font_manager.findSystemFonts():
        if file not in known:  # installed since matplotlib last looked
            _add(manager, file)
    names = _files()
    return [*(name for name in CHINESE if name in names), *(n for n in names if n not in CHINESE)]


def _files() -> dict[str, str]:
    """The upright fonts that matplotlib knows, and a file of each."""
    from matplotlib import font_manager

    return {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and not font.name.startswith("Last Resort")  # has boxes alone
    }


def _add(manager, file: str) -> None:
    with suppress(Exception):  # what matplotlib cannot read is no font for it
        manager.addfont(file)


@lru_cache
def _characters(name: str) -> frozenset[str]:
    """The characters that a font has."""
    from matplotlib.font_manager import get_font

    return frozenset(map(chr, get_font(_files()[name]).get_charmap()))
