"""Small charts as SVG text: lines over the steps of a run, and a histogram. Colours are those of the page's classes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 360, 180
_LEFT, _BOTTOM, _TOP = 56, 22, 8
_MOST = 400  # points of a line
_SMOOTHED = 0.02  # share of the steps over which a line is averaged


def lines(steps: Sequence[int], series: Mapping[str, Sequence[float | None]]) -> str:
    """Lines over the steps, each raw and smoothed; steps without a value are left out. The first two differ."""
    found = {name: _points(steps, values) for name, values in series.items()}
    known = [y for points in found.values() for _, y in points]
    if not known:
        return ""
    low, high = _range(known)
    parts = [_axes(f"{steps[0]}", f"{steps[-1]}", low, high)]
    for number, points in enumerate(found.values()):
        colour = " second" if number else ""
        place = [(_x(x, steps[0], steps[-1]), y) for x, y in points]
        parts.append(_path(place, low, high, f"raw{colour}"))
        smooth = _average([y for _, y in points])
        parts.append(_path([(x, y) for (x, _), y in zip(place, smooth, strict=True)], low, high, f"smooth{colour}"))
    return _svg(f"{', '.join(series)} over {len(steps)} steps, last {_last(found)}", parts)


def histogram(values: np.ndarray, label: str) -> str:
    """A histogram of gains [n], with the losses in another colour."""
    edge = float(np.abs(values).max()) or 1.0
    counts, edges = np.histogram(values, bins=30, range=(-edge, edge))
    parts = [_axes(f"{-edge:.3g}", f"{edge:.3g}", 0, float(counts.max()))]
    width = (WIDTH - _LEFT) / len(counts)
    for i, count in enumerate(counts):
        height = (HEIGHT - _BOTTOM - _TOP) * count / counts.max()
        kind = "bar loss" if edges[i + 1] <= 1e-12 else "bar"
        parts.append(
            f'<rect class="{kind}" x="{_LEFT + i * width:.1f}" y="{HEIGHT - _BOTTOM - height:.1f}" '
            f'width="{width - 1:.1f}" height="{height:.1f}"/>'
        )
    return _svg(f"{label}: {int((values > 0).sum())} gains and {int((values < 0).sum())} losses", parts)


def _last(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """The last value of each line, as text."""
    return ", ".join(f"{points[-1][1]:.3g}" for points in found.values() if points)


def _points(steps: Sequence[int], values: Sequence[float | None]) -> list[tuple[float, float]]:
    known = [(float(s), float(v)) for s, v in zip(steps, values, strict=True) if v is not None and np.isfinite(v)]
    if len(known) <= _MOST:
        return known
    groups = np.array_split(np.array(known), _MOST)
    return [(float(g[:, 0].mean()), float(g[:, 1].mean())) for g in groups]


def _average(values: Sequence[float]) -> list[float]:
    weight = 1 / max(1.0, _SMOOTHED * len(values) * 2.5)
    found: list[float] = []
    for value in values:
        found.append(value if not found else found[-1] + weight * (value - found[-1]))
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    room = (high - low or abs(high) or 1.0) * 0.05
    return low - room, high + room


def _x(value: float, first: float, last: float) -> float:
    return _LEFT + (WIDTH - _LEFT - 6) * (value - first) / ((last - first) or 1)


def _path(points: Sequence[tuple[float, float]], low: float, high: float, kind: str) -> str:
    scale = (HEIGHT - _BOTTOM - _TOP) / (high - low)
    text = " ".join(f"{x:.1f},{HEIGHT - _BOTTOM - (y - low) * scale:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{text}"/>'


def _axes(left: str, right: str, low: float, high: float) -> str:
    floor = HEIGHT - _BOTTOM
    return (
        f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{WIDTH}" fill="none"/>'
        f'<text x="{_LEFT - 4}" y="{floor}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT - 4}" y="{_TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT}" y="{HEIGHT - 6}">{left}</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 6}" text-anchor="end">{right}</text>'
    )


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
