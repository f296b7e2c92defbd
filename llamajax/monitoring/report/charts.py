"""Line charts as inline SVG, without scripts; coloured by the page, so light and dark both work."""

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 24, 10, 28
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
    """Round numbers in [low, high], about `count` of them, 1, 2 or 5 times a power of ten apart."""
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
    """At most about 500 points that keep every bucket's smallest and largest value."""
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
    """The mean over a fiftieth of the points around each; what is not finite is skipped."""
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


def _log_range(values: Sequence[float]) -> tuple[float, float]:
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))


def _paths(series: Series, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    parts, run = [], []
    for step, value in [*thin(series.points), (0, math.nan)]:
        if math.isfinite(value):
            run.append(f"{x(step):.1f},{y(value):.1f}")
        elif run:
            single = len(run) == 1 and not series.markers
            shape = (
                f'<circle class="dot {series.style}" cx="{run[0].split(",")[0]}" '
                f'cy="{run[0].split(",")[1]}" r="2.5"/>'
                if single
                else f'<polyline class="line {series.style}" points="{" ".join(run)}"/>'
            )
            parts.append(shape)
            run = []
    if series.markers:
        parts += [
            f'<circle class="dot {series.style}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3">'
            f"<title>{html.escape(series.label)}, step {s}: {v:.4g}</title></circle>"
            for s, v in thin(series.points)
            if math.isfinite(v)
        ]
    return "".join(parts)


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in y_ticks
    ]
    parts += [
        f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'
        for x, label in x_ticks
    ]
    parts.append(
        f'<text class="tick" x="{_LEFT - 8}" y="{bottom + 18}" text-anchor="end">step</text>'
    )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    format_value: Callable[[float], str],
    zero: bool = False,
    level: tuple[str, float] | None = None,
) -> str:
    """An SVG element with a figure caption; a plain note where there is no finite point.

    zero: the value axis starts at 0. level: a labelled horizontal line. The value axis is
    logarithmic where positive values span more than two powers of ten.
    """
    caption = f"<figcaption>{html.escape(title)}{_legend(series)}</figcaption>"
    points = [p for line in series for p in line.points if math.isfinite(p[1])]
    if not points:
        return f'<figure>{caption}<p class="none">nothing logged yet</p></figure>'
    values = [value for _, value in points] + ([level[1]] if level else [])
    log = min(values) > 0 and max(values) / min(values) > _LOG_RATIO and not zero
    low, high = _log_range(values) if log else _range(values, zero=zero)
    first, last = min(s for s, _ in points), max(s for s, _ in points)
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        place = math.log10(value) if log else value
        return bottom - (bottom - _TOP) * (place - low) / ((high - low) or 1)

    if log:
        y_values = [10.0**power for power in range(int(low), int(high) + 1)]
    else:
        y_values = nice_ticks(low, high, count=5)
    x_values = [s for s in nice_ticks(first, last, count=6) if s == int(s)]
    parts = _axes(
        [(x(s), f"{int(s):,}") for s in x_values],
        [(y(v), html.escape(format_value(v))) for v in y_values],
    )
    if level:
        place = y(level[1])
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text class="tick" x="{right}" y="{place - 5:.1f}" text-anchor="end">'
            f"{html.escape(level[0])}</text>"
        )
    parts += [_paths(line, x, y) for line in series]
    label = html.escape(f"{title}, steps {first} to {last}", quote=True)
    return (
        f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _legend(series: Sequence[Series]) -> str:
    named = [line for line in series if line.label and line.points]
    if len(named) < 2:
        return ""
    return "".join(
        f'<span class="key {line.style}">{html.escape(line.label)}</span>' for line in named
    )
