"""Line charts as inline SVG, without scripts; colored by the page, so light and dark both work."""

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, WIDTH - 24, 10, HEIGHT - 28  # of the plot
_MAX_POINTS = 500
_LOG_RATIO = 100


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: points (step, value), in step order; a value that is not finite breaks it.

    style: a CSS class of the page (`main`, `faint`, `second`). markers: whether points are drawn.
    """

    label: str
    points: Sequence[tuple[int, float]]
    style: str = "main"
    markers: bool = False


def nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Return about `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(s - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most about 500 points that keep every bucket's smallest and largest value."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        broken = [point for point in bucket if not math.isfinite(point[1])]
        whole = [point for point in bucket if math.isfinite(point[1])] or bucket[:1]
        ends = {min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1]), *broken[:1]}
        kept += sorted(ends)
    return kept


def smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Average over a fiftieth of the points around each; skip what is not finite."""
    whole = [point for point in points if math.isfinite(point[1])]
    half = max(1, len(whole) // 100)
    sums = [0.0, *itertools.accumulate(value for _, value in whole)]
    smoothed = []
    for i, (step, _) in enumerate(whole):
        # Narrower towards the ends, so that the mean stays around its own point.
        reach = min(half, i, len(whole) - 1 - i)
        total = sums[i + reach + 1] - sums[i - reach]
        smoothed.append((step, total / (2 * reach + 1)))
    return smoothed


def _range(values: Sequence[float], *, zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if zero:
        low = min(0.0, low)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return (low if zero else low - margin), high + margin


def _line(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts, run = [], []
    for step, value in [*thin(series.points), (0, math.nan)]:
        if math.isfinite(value):
            run.append((f"{x(step):.1f}", f"{y(value):.1f}"))
        elif len(run) == 1 and not series.markers:
            left, top = run[0]
            parts.append(f'<circle class="dot {series.style}" cx="{left}" cy="{top}" r="2.5"/>')
            run = []
        elif run:
            points = " ".join(",".join(point) for point in run)
            parts.append(f'<polyline class="line {series.style}" points="{points}"/>')
            run = []
    if series.markers:
        parts += [
            f'<circle class="dot {series.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3">'
            f"<title>{html.escape(series.label)}, step {s}: {v:.4g}</title></circle>"
            for s, v in thin(series.points)
            if math.isfinite(v)
        ]
    return "".join(parts)


def _text(x: str, y: str, label: str, anchor: str = "end") -> str:
    return f'<text class="tick" x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'


def _level_line(css: str, y: str) -> str:
    return f'<line class="{css}" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>'


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    format_value: Callable[[float], str],
    zero: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """Return an SVG element with a figure caption; a plain note where there is no finite point.

    zero: the value axis starts at 0. level: a labeled horizontal line. The value axis is
    logarithmic where positive values span more than two powers of ten.
    """
    named = [line for line in series if line.label and line.points]
    keys = [f'<span class="key {s.style}">{html.escape(s.label)}</span>' for s in named]
    legend = "".join(keys) if len(keys) > 1 else ""
    caption = f"<figcaption>{html.escape(title)}{legend}</figcaption>"
    points = [p for line in series for p in line.points if math.isfinite(p[1])]
    if not points:
        return f'<figure>{caption}<p class="none">nothing logged yet</p></figure>'
    values = [value for _, value in points] + ([level[1]] if level else [])
    low, high = _range(values, zero=zero)
    y_ticks = nice_ticks(low, high, count=5)
    log = min(values) > 0 and max(values) / min(values) > _LOG_RATIO and not zero
    if log:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        y_ticks = [10.0**power for power in range(low, high + 1)]
    first, last = min(s for s, _ in points), max(s for s, _ in points)

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        height = (math.log10(value) if log else value) - low
        return _BOTTOM - (_BOTTOM - _TOP) * height / ((high - low) or 1)

    left, below = f"{_LEFT - 8}", f"{_BOTTOM + 18}"
    parts = []
    for value in y_ticks:
        parts.append(_level_line("grid", f"{y(value):.1f}"))
        parts.append(_text(left, f"{y(value) + 4:.1f}", html.escape(format_value(value))))
    for step in nice_ticks(first, last, count=6):
        if step == int(step):
            parts.append(_text(f"{x(step):.1f}", below, f"{int(step):,}", "middle"))
    parts += [_text(left, below, "step"), _level_line("axis", str(_BOTTOM))]
    if level:
        parts.append(_level_line("level", f"{y(level[1]):.1f}"))
        parts.append(_text(str(_RIGHT), f"{y(level[1]) - 5:.1f}", html.escape(level[0])))
    parts += [_line(line, x, y) for line in series]
    label = html.escape(f"{title}, steps {first} to {last}", quote=True)
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )
