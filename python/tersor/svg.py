"""Small inline SVG plots for reports: no script, no font, no address outside the page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#4269d0", "#e8890c", "#d6453d", "#2a9d8f", "#7b52ab", "#8c6d31", "#c2528b", "#5b7f2b", "#5f9bd6", "#777777")
_WIDTH = 720


@dataclass(frozen=True)
class Bar:
    """A bar: a ghost of ``before`` behind ``after``, with the words shown at its end."""

    label: str
    before: float
    after: float
    text: str


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars on one scale, the former value as an outline behind the present one."""
    top = max((max(row.before, row.after) for row in rows), default=0) or 1
    left, right, step = 150, 190, 26
    scale = (_WIDTH - left - right) / top
    parts = []
    for i, row in enumerate(rows):
        y = i * step
        parts.append(f'<text class="label" x="{left - 8}" y="{y + 15}" text-anchor="end">{_text(row.label)}</text>')
        parts.append(f'<rect class="ghost" x="{left}" y="{y + 3}" width="{row.before * scale:.1f}" height="17" '
                     'rx="2"/>')
        parts.append(f'<rect fill="{COLOURS[0]}" x="{left}" y="{y + 3}" width="{row.after * scale:.1f}" height="17" '
                     f'rx="2"><title>{_text(row.label)}: {_text(row.text)}</title></rect>')
        end = left + max(row.before, row.after) * scale + 8
        parts.append(f'<text class="value" x="{end:.1f}" y="{y + 16}">{_text(row.text)}</text>')
    return _frame(parts, len(rows) * step + 4, label)


def lines(series: Mapping[str, Sequence[tuple[float, float, str]]], label: str, x_name: str, y_name: str,
          log: bool = False, guides: Mapping[str, Callable[[float], float]] | None = None) -> str:
    """Points ``(x, y, words)`` of named series, joined in order, with a legend; axes from 0, or both logarithmic.

    ``guides`` are named curves ``y(x)`` drawn dashed behind the points, such as the roofs of a roofline.
    """
    points = [point for values in series.values() for point in values if math.isfinite(point[1])]
    if not points:
        return ""
    left, right, top, height = 62, 150, 30, 270
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if guides:
        ys += [guide(x) for guide in guides.values() for x in (min(xs), max(xs))]
    x_axis = _Axis.over(xs, left, _WIDTH - right, log, False)
    y_axis = _Axis.over(ys, top + height, top, log, not log)
    parts = []
    for value in y_axis.ticks:
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x_axis.ticks:
        parts.append(f'<text class="tick" x="{x_axis(value):.1f}" y="{top + height + 17}" text-anchor="middle">'
                     f'{value:.4g}</text>')
    parts.append(f'<text class="tick" x="{(left + _WIDTH - right) / 2}" y="{top + height + 34}" text-anchor="middle">'
                 f'{_text(x_name)}</text>')
    parts.append(f'<text class="tick" x="{left}" y="{top - 14}" text-anchor="middle">{_text(y_name)}</text>')
    for name, guide in (guides or {}).items():
        samples = _between(min(xs), max(xs), log)
        path = " ".join(f"{x_axis(x):.1f},{y_axis(guide(x)):.1f}" for x in samples)
        parts.append(f'<polyline class="guide" points="{path}"><title>{_text(name)}</title></polyline>')
        parts.append(f'<text class="tick" x="{_WIDTH - right + 6}" y="{y_axis(guide(max(xs))) + 4:.1f}">'
                     f'{_text(name)}</text>')
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        values = [value for value in values if math.isfinite(value[1])]
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y, _ in values)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.3" opacity="0.55" points="{path}"/>')
        parts += [f'<circle fill="{colour}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3.6">'
                  f"<title>{_text(words)}</title></circle>" for x, y, words in values]
        # The names of guides stand to the right, at their ends; then the legend goes below.
        x, y = (left, top + height + 58 + 18 * i) if guides else (_WIDTH - right + 14, top + 10 + 18 * i)
        parts.append(f'<circle fill="{colour}" cx="{x}" cy="{y - 4}" r="4"/>')
        parts.append(f'<text class="label" x="{x + 10}" y="{y}">{_text(name)}</text>')
    legend = top + 18 * len(series) + (height + 48 if guides else 10)
    return _frame(parts, max(top + height + 40, legend), label)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool, from_zero: bool) -> "_Axis":
        low, high = min(values), max(values)
        if log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.0001))
            decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
            return cls(low, high, start, end, True, tuple(10.0**d for d in decades))
        low = 0.0 if from_zero else low
        high = high if high > low else low + 1
        step = 10 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        if not from_zero:
            step = max(1.0, step)  # block numbers
        first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9) if from_zero else int(high / step)
        ticks = tuple(step * i for i in range(first, last + 1))
        return cls(low, max(high, ticks[-1]) if from_zero else high, start, end, False, ticks)

    def __call__(self, value: float) -> float:
        position = (math.log(value / self.low) / math.log(self.high / self.low) if self.log
                    else (value - self.low) / (self.high - self.low))
        return self.start + position * (self.end - self.start)


def _between(low: float, high: float, log: bool, count: int = 60) -> list[float]:
    if log:
        return [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def _frame(parts: list[str], height: float, label: str) -> str:
    return (f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{_text(label)}">'
            f'{"".join(parts)}</svg>')


def _text(value: object) -> str:
    return html.escape(str(value))
