"""Line charts and stacked bars as plain SVG text: pure functions, no script, no font and no file from elsewhere.

Colours are CSS variables with a fallback (`--series-1` to `--series-6`), text and grid take `currentColor`: a page
restyles the charts for a dark screen, and one chart alone still reads. Every value is a `<title>`, shown on hover.
Coordinates are pixels of a 400-wide drawing, y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, PLOT_HEIGHT = 400, 150
NARROW, WIDE = 7.0, 9.0  # px, a lower-case letter or digit and a capital of a broad 12 px font: labels stay apart
COLOURS = ("#3b64ad", "#c2691c", "#2f8a68", "#8d5aa8", "#a8893a", "#6b7480")
DASHES = ("6 4", "2 3", "10 3 2 3")
MAX_TARGETS = 200  # values one can hover; a longer line is drawn whole and answers at every n-th point
MAX_DOTS = 40  # a longer series is a line without dots
MAX_BARS = 60

Points = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Axis:
    """A scale from data (`low`..`high`) to pixels (`start`..`end`), with its ticks in data units."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        scale = math.log10 if self.log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)

    def label(self, value: float) -> str:
        """The value with as many digits as the distance of the ticks asks for, so that no two labels read alike."""
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else 0.0
        largest = max(abs(tick) for tick in self.ticks)
        if self.log or not step or largest < 1e-3 or step >= 1e5:
            return format_value(value, 4 if self.log or not step else math.ceil(math.log10(largest / step)) + 2)
        return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "−")


def text_width(text: str) -> float:
    """Pixels to keep free for a 12 px label; no common sans-serif font needs more."""
    return sum(WIDE if letter.isupper() or letter in "mw%" else NARROW for letter in text)


def format_value(value: float, digits: int = 4) -> str:
    """`digits` significant digits, and all before the point of a value below a million: `0.1235`, `1,500`, `1e−5`."""
    if value == 0:
        return "0"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else mantissa).replace("-", "−")


def line_chart(
    series: Mapping[str, Points],
    title: str,
    y_label: str,
    log: bool = False,
    *,
    x_label: str = "step",
    references: Mapping[str, float] | None = None,
) -> str:
    """One line per series over a shared x axis.

    Args:
        series: name to (x, y) in the order of x. A y that is None, not finite, or not positive when `log`, is a gap.
        title: shown above the chart; also its accessible name.
        y_label: what y is, with its unit; may be empty.
        log: draw y on a logarithmic scale.
        x_label: what x is.
        references: name to a constant, drawn as a dashed level across the plot.

    Returns:
        One `<svg>` element. A chart without a single value says so.
    """
    clean = {name: [(x, _drawable(y, log)) for x, y in points] for name, points in series.items()}
    levels = {name: y for name, level in (references or {}).items() if (y := _drawable(level, log)) is not None}
    ys = [y for points in clean.values() for _, y in points if y is not None]
    if not ys:
        return _frame(title, y_label, [], "", 0, "no values")
    marks = [(name, index, "") for index, name in enumerate(clean)] if len(clean) + len(levels) > 1 else []
    marks += [(name, -1, DASHES[index % len(DASHES)]) for index, name in enumerate(levels)]
    legend, top = _legend(marks, y_label)
    vertical = _vertical_axis([*ys, *levels.values()], top, log)
    horizontal = _horizontal_axis([x for points in clean.values() for x, y in points if y is not None], vertical)
    body = _grid(horizontal, vertical, x_label)
    for (name, level), dash in zip(levels.items(), [dash for _, index, dash in marks if index < 0], strict=True):
        y = vertical.place(level)
        body += (
            f'<g class="level"><title>{escape(name)}: {format_value(level)}</title>'
            f'<path d="M{horizontal.start:.1f} {y:.1f}H{horizontal.end:.1f}" stroke="currentColor" '
            f'stroke-dasharray="{dash}" stroke-opacity=".6" fill="none"/></g>'
        )
    for index, (name, points) in reversed(list(enumerate(clean.items()))):  # the first series lies on top
        body += _line(name, index, points, horizontal, vertical, x_label)
    summary = "; ".join(_describe(name, points) for name, points in clean.items())
    return _frame(title, y_label, [legend, body], summary, top + PLOT_HEIGHT)


def stacked_bars(series: Mapping[str, Points], title: str, y_label: str, *, x_label: str = "step") -> str:
    """One bar per x, the series stacked in their order from the bottom.

    Args:
        series: name to (x, y), y not negative; a missing or non-finite y counts as nothing.
        title: shown above the chart; also its accessible name.
        y_label: what y is, with its unit.
        x_label: what x is.

    Returns:
        One `<svg>` element. More than `MAX_BARS` values of x are drawn as the means of equal runs of neighbours.
    """
    values = {
        name: {x: height for x, y in points if (height := _drawable(y, False)) is not None}
        for name, points in series.items()
    }
    xs = sorted({x for of_x in values.values() for x in of_x})
    if not xs:
        return _frame(title, y_label, [], "", 0, "no values")
    size = math.ceil(len(xs) / MAX_BARS)
    bins = [xs[start : start + size] for start in range(0, len(xs), size)]
    heights = {name: [sum(of_x.get(x, 0.0) for x in run) / len(run) for run in bins] for name, of_x in values.items()}
    legend, top = _legend([(name, index, "") for index, name in enumerate(series)], y_label)
    vertical = _vertical_axis([0.0, *(sum(column) for column in zip(*heights.values(), strict=True))], top, False)
    half = min((b[0] - a[0] for a, b in pairwise(bins)), default=1.0) / 2
    centres = [(run[0] + run[-1]) / 2 for run in bins]
    horizontal = _horizontal_axis([centres[0] - half, centres[-1] + half], vertical, inside=(xs[0], xs[-1]))
    width = max(0.5, (horizontal.place(half) - horizontal.place(0)) * 1.6)
    body, base = _grid(horizontal, vertical, x_label), [0.0] * len(bins)
    for index, (name, column) in enumerate(heights.items()):
        body += f'<g style="color:{_colour(index)}" fill="currentColor">'
        for place, height in enumerate(column):
            run, low, high = bins[place], vertical.place(base[place]), vertical.place(base[place] + height)
            span = format_value(run[0]) + (f" to {format_value(run[-1])}, mean" if len(run) > 1 else "")
            body += (
                f'<rect class="bar" x="{horizontal.place(centres[place]) - width / 2:.1f}" y="{high:.1f}" '
                f'width="{width:.1f}" height="{low - high:.1f}">'
                f"<title>{escape(name)}, {escape(x_label)} {span}: {format_value(height)}</title></rect>"
            )
            base[place] += height
        body += "</g>"
    summary = "; ".join(_describe(name, list(zip(centres, column, strict=True))) for name, column in heights.items())
    return _frame(title, y_label, [legend, body], summary, top + PLOT_HEIGHT)


def _drawable(value: float | None, log: bool) -> float | None:
    if value is None or not abs(value) < 1e300:  # false for NaN; an axis needs room beyond its values
        return None
    near = value if abs(value) > 1e-300 else 0.0
    return None if log and near <= 0 else near


def _colour(index: int) -> str:
    colour = index % len(COLOURS)
    return f"var(--series-{colour + 1},{COLOURS[colour]})"


def _nice_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts `span` into at most `count` pieces."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= span / count * (1 - 1e-9))


def _multiples(low: float, high: float, step: float) -> tuple[float, ...]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{k * step:.12g}") for k in range(first, last + 1))  # 3 * 0.1 reads 0.3


def _vertical_axis(ys: Sequence[float], top: float, log: bool) -> Axis:
    low, high = min(ys), max(ys)
    if log:
        return _log_axis(low, high, top)
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # a constant lies in the middle of a plot of its own size
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    if 0 < low < 0.3 * high:
        low = 0.0
    step = _nice_step(high - low, 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Axis(low, high, top + PLOT_HEIGHT, top, _multiples(low, high, step))


def _log_axis(low: float, high: float, top: float) -> Axis:
    """Ticks at powers of ten, thinned to six; at 1, 2 and 5 of each decade when the values span less than two."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    powers = [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 5))]
    if last - first <= 2:
        fine = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
        start = max(index for index, tick in enumerate(fine) if tick <= low * (1 + 1e-9))
        end = next((index for index, tick in enumerate(fine) if tick >= high * (1 - 1e-9)), len(fine) - 1)
        powers = fine[start : max(end, start + 1) + 1]
    ticks = tuple(float(f"{tick:.12g}") for tick in powers)
    return Axis(ticks[0], max(ticks[-1], high), top + PLOT_HEIGHT, top, ticks, log=True)


def _horizontal_axis(xs: Sequence[float], vertical: Axis, inside: tuple[float, float] | None = None) -> Axis:
    """From the least to the largest x, right of the widest y label, with ticks no closer than their labels are wide."""
    start = max(30.0, 10 + max(text_width(vertical.label(tick)) for tick in vertical.ticks))
    low, high = min(xs), max(xs)
    if low == high:
        return Axis(low - 1, high + 1, start, WIDTH - 16, (low,))
    first, last = inside or (low, high)
    count = max(1, min(6, int((WIDTH - 16 - start) / (text_width(format_value(high)) + 24))))
    whole = all(float(x).is_integer() for x in (first, last))
    step = max(_nice_step(last - first, count) if last > first else 1.0, 1.0 if whole else 0.0)
    return Axis(low, high, start, WIDTH - 16, _multiples(first, last, step) or (first,))


def _grid(horizontal: Axis, vertical: Axis, x_label: str) -> str:
    bottom = vertical.start
    parts = ['<g fill="currentColor" stroke="none" fill-opacity=".68">']
    for tick in vertical.ticks:
        y = vertical.place(tick)
        parts.append(
            f'<text x="{horizontal.start - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{vertical.label(tick)}</text>'
        )
        rule = f'<path d="M{horizontal.start:.1f} {y:.1f}H{horizontal.end:.1f}" stroke="currentColor" '
        parts.append(rule + f'stroke-opacity="{".35" if y == bottom else ".12"}"/>')
    for tick in horizontal.ticks:
        x, label = horizontal.place(tick), horizontal.label(tick)
        text_x = min(x, WIDTH - text_width(label) / 2)  # the last label stays inside the drawing
        parts.append(f'<path d="M{x:.1f} {bottom:.1f}v4" stroke="currentColor" stroke-opacity=".35"/>')
        parts.append(f'<text x="{text_x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{label}</text>')
    middle = (horizontal.start + horizontal.end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 35:.1f}" text-anchor="middle">{escape(x_label)}</text></g>')
    return "".join(parts)


def _line(name: str, index: int, points: Points, horizontal: Axis, vertical: Axis, x_label: str) -> str:
    """The path of a series, a new piece after each gap, and a titled circle for each value."""
    shown = [(x, y) for x, y in points if y is not None]
    stride = math.ceil(len(shown) / MAX_TARGETS) or 1
    targets = {x for position, (x, _) in enumerate(shown) if position % stride == 0 or position == len(shown) - 1}
    path, circles = [], []
    for position, (x, y) in enumerate(points):
        if y is None:
            continue
        before, after = points[position - 1 : position], points[position + 1 : position + 2]
        joined = bool(before) and before[0][1] is not None
        alone = not joined and (not after or after[0][1] is None)
        at = f"{horizontal.place(x):.1f}", f"{vertical.place(y):.1f}"
        path.append(("L" if joined else "M") + " ".join(at))
        if x in targets or alone:
            dot = alone or len(shown) <= MAX_DOTS
            look = 'class="dot" r="2.6"' if dot else 'class="target" r="5" fill-opacity="0"'
            circles.append(
                f'<circle {look} cx="{at[0]}" cy="{at[1]}">'
                f"<title>{escape(name)}, {escape(x_label)} {format_value(x)}: {format_value(y)}</title></circle>"
            )
    weight = 1.8 if len(shown) <= MAX_DOTS else 1.2  # a long series is noise around a trend: the thin line shows both
    line = f'<path d="{"".join(path)}" fill="none" stroke="currentColor" stroke-width="{weight}"/>'
    return f'<g style="color:{_colour(index)}" fill="currentColor" stroke-linejoin="round">{line}{"".join(circles)}</g>'


def _legend(marks: Sequence[tuple[str, int, str]], y_label: str) -> tuple[str, float]:
    """The legend of (name, colour, dash), beside the y label or in rows below it; and the y where the plot begins."""
    widths = [18 + text_width(name) + 12 for name, _, _ in marks]
    beside = text_width(y_label) + 12 + sum(widths) <= WIDTH
    x, y = (WIDTH - sum(widths) + 12, 33.0) if beside else (0.0, 54.0)
    parts = []
    for (name, colour, dash), width in zip(marks, widths, strict=True):
        if not beside and x > 0 and x + width > WIDTH:
            x, y = 0.0, y + 18
        look = f'stroke-dasharray="{dash}" stroke-opacity=".6"' if dash else f'style="color:{_colour(colour)}"'
        parts.append(
            f'<path d="M{x:.1f} {y - 4:.1f}h14" stroke="currentColor" stroke-width="{1 if dash else 3}" {look}/>'
            f'<text x="{x + 18:.1f}" y="{y:.1f}" fill="currentColor">{escape(name)}</text>'
        )
        x += width
    return "".join(parts), y + 17


def _describe(name: str, points: Points) -> str:
    shown = [f"{format_value(y)} at {format_value(x)}" for x, y in points if y is not None] or ["no values"]
    return f"{name}: {', '.join(dict.fromkeys((shown[0], shown[-1])))}"


def _frame(title: str, y_label: str, parts: list[str], summary: str, bottom: float, message: str = "") -> str:
    muted = 'fill="currentColor" fill-opacity=".68"'
    note = f'<text x="0" y="72" {muted}>{escape(message)}</text>' if message else ""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {100 if message else bottom + 42:.0f}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui,sans-serif" font-size="12">'
        f"<desc>{escape(summary or message)}</desc>"
        f'<text x="0" y="15" fill="currentColor" font-size="14" font-weight="600">{escape(title)}</text>'
        f'<text x="0" y="33" {muted}>{escape(y_label)}</text>{note}{"".join(parts)}</svg>'
    )
