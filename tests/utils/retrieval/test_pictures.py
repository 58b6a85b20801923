"""Pictures of predictions: everything on them is inside, apart, and to scale."""

from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from utils.retrieval import plots
from utils.retrieval.plots import draw_found, draw_ranking, plot_confusion
from utils.retrieval.ranking import Ranked

pytestmark = pytest.mark.filterwarnings("ignore:Glyph")  # without a Chinese font

SHORT, LONG = "a dog runs", "TWO BROWN DOGS RUN THROUGH THE SNOW BESIDE A WOODEN FENCE " * 5
PORTRAIT, LANDSCAPE, PANORAMA = (
    Image.new("RGB", size) for size in ((300, 400), (500, 375), (900, 90))
)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def boxes(figure) -> dict[str, tuple[float, float, float, float]]:
    """{text: (left, bottom, right, top)} in pixels of all texts, which do not overlap and are
    inside of the figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = {t.get_text(): t.get_window_extent().extents for t in figure.axes[0].texts}
    assert all(min(box) >= 0 for box in found.values())
    assert all(
        box[2] <= figure.bbox.width and box[3] <= figure.bbox.height for box in found.values()
    )
    for a, b in combinations(found.values(), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    return found


def image_boxes(figure) -> np.ndarray:
    """(left, bottom, right, top) in pixels of each image."""
    return np.array([image.get_window_extent().extents for image in figure.axes[0].images])


@pytest.mark.parametrize("image", [PORTRAIT, LANDSCAPE, PANORAMA])
def test_a_caption_wraps_beside_its_bar_and_the_highest_probability_is_the_longest(image, drawn):
    ranked = [Ranked(SHORT, 0.03, 0.3), Ranked(LONG, 0.015, 0.2), Ranked("x" * 999, 0.0, -0.1)]
    draw_ranking(image, ranked, "unused")
    texts = boxes(drawn[0])
    bars = [bar.get_window_extent().extents for bar in drawn[0].axes[0].patches]
    lengths = [right - left for left, _, right, _ in bars]
    assert np.array(lengths) / lengths[0] == pytest.approx([1, 0.5, 0], abs=1e-6)
    for bar, words in zip(bars, (SHORT, LONG[:20], "xxx"), strict=True):
        (own,) = (box for text, box in texts.items() if text.startswith(words))
        assert own[0] > bar[2] and own[1] + own[3] == pytest.approx(bar[1] + bar[3], abs=8)
    (long,) = (text for text in texts if text.startswith(LONG[:20]))
    assert long.count("\n") == 2 and long.endswith(" ...")
    left, bottom, right, top = image_boxes(drawn[0])[0]
    assert (right - left) / (top - bottom) == pytest.approx(image.width / image.height)
    assert right < bars[0][0]


def test_ten_images_are_five_by_two_and_of_equal_heights(drawn):
    images = [PORTRAIT, LANDSCAPE] * 5
    found = [(image, f"{place}. {LONG}") for place, image in enumerate(images)]
    draw_found(f"a query, {LONG}", found, "unused")
    assert any(text.startswith("a query, TWO") for text in boxes(drawn[0]))
    left, bottom, right, top = image_boxes(drawn[0]).T
    middle = (left + right) / 2
    assert middle[:5] == pytest.approx(middle[5:]) and (np.diff(middle[:5]) > 0).all()
    assert len({*bottom.round()}) == 2 and top - bottom == pytest.approx(top[0] - bottom[0])
    assert (right - left)[:2] == pytest.approx((top[0] - bottom[0]) * np.array([3 / 4, 4 / 3]))


@pytest.mark.parametrize("count, columns", [(1, 1), (6, 6), (7, 4), (11, 6)])
def test_any_number_of_images_fills_its_rows(count, columns, drawn):
    draw_found("一只狗" * 99, [(PANORAMA, f"{i}. 图" * 99) for i in range(count)], "unused")
    boxes(drawn[0])
    left, _, right, top = image_boxes(drawn[0]).T
    assert len({*left.round()}) == columns and len({*top.round()}) == -(-count // columns)
    assert left.min() >= 0 and right.max() <= drawn[0].bbox.width


@pytest.mark.parametrize("classes, is_numbered", [(20, True), (21, False)])
def test_few_classes_have_their_numbers_of_images_in_the_cells(classes, is_numbered, drawn):
    confusion = torch.arange(classes**2).view(classes, classes)
    plot_confusion({"a": confusion}, list(map(str, range(classes))), "unused")
    cells = {
        (t.get_position()[1], t.get_position()[0]): t.get_text() for t in drawn[0].axes[0].texts
    }
    expected = {(i // classes, i % classes): str(i) for i in range(1, classes**2)}
    assert cells == (expected if is_numbered else {})
