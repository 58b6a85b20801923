"""Curves as coordinates, for the inline SVG of report.html.j2."""

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import NamedTuple

import numpy as np

LEFT, RIGHT, TOP, BOTTOM = 34, 200, 10, 152  # of the plot, in a drawing 320 wide and 175 high
LINE = 15  # from one name to the next


class Curve(NamedTuple):
    """A name with the last value, the height at which it stands beside the end, and the points: (x,
    y, what it shows)."""

    name: str
    label: float
    points: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Curves, and the ticks of both axes with their places."""

    title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]


def draw(
    title: str, curves: dict[str, dict[float, float]], x_ticks: Sequence[int] = ()
) -> Chart | None:
    """The chart of `curves`, {name: {x: y}}. Values that are not finite are left out; None if there
    are no others. With `x_ticks`, which are chosen otherwise, the axis of y starts at 0."""
    from matplotlib.ticker import MaxNLocator

    finite = {name: {x: y for x, y in c.items() if isfinite(x + y)} for name, c in curves.items()}
    xs = sorted({x for curve in finite.values() for x in curve})
    ys = [y for curve in finite.values() for y in curve.values()]
    if not ys:
        return None
    y_ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(
        0 if x_ticks else min(ys), max(ys)
    )
    if not x_ticks:
        chosen = MaxNLocator(5, integer=True).tick_values(xs[0], xs[-1])
        x_ticks = [x for x in chosen if xs[0] <= x <= xs[-1]]
    across = partial(_place, start=xs[0], end=xs[-1], places=(LEFT, RIGHT))
    up = partial(_place, start=y_ticks[0], end=y_ticks[-1], places=(BOTTOM, TOP))
    drawn = [_curve(name, curve, across, up) for name, curve in finite.items() if curve]
    label = 0.0
    for i in sorted(range(len(drawn)), key=lambda i: drawn[i].label):
        label = max(label, drawn[i].label)
        drawn[i] = drawn[i]._replace(label=label)
        label += LINE
    return Chart(
        title,
        [(across(x), f"{x:g}") for x in x_ticks],
        [(up(y), f"{y:g}") for y in y_ticks],
        drawn,
    )


def _place(value: float, start: float, end: float, places: tuple[float, float]) -> float:
    return round(float(np.interp(value, (start, end), places)), 1)


def _curve(name: str, values: dict[float, float], across: Callable, up: Callable) -> Curve:
    points = [(across(x), up(y), f"{x:g}: {y:.4g}") for x, y in values.items()]
    last = list(values.values())[-1]
    return Curve(f"{name} {last:.3g}".lstrip(), points[-1][1], points)
