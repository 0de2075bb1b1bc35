"""Line charts as inline SVG: they follow the colors of the page, and print at any resolution."""

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
MAX_DOTS = 40  # of a line with a dot at each point
MAX_POINTS = 500  # of a line: more are not visible at this width
Points = Sequence[tuple[float, float]]


def draw_chart(lines: Mapping[str, Points], title: str, unit: str, x_name: str = "step") -> str:
    """Return a line chart, <figure>, with a legend in words.

    Args:
        lines: {name: [(x, y)]}; values that are not finite are left out.
        title: of the chart, its accessible name as well.
        unit: of y, the label of its axis.
    """
    finite = {
        name: thin_out([(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)])
        for name, points in lines.items()
    }
    shown = {name: points for name, points in finite.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    x_ticks, y_ticks = choose_ticks(min(xs), max(xs)), choose_ticks(min(ys), max(ys))
    x_range = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_range = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        u = (x - x_range[0]) / (x_range[1] - x_range[0])
        v = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + u * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        at = f"{place(x_range[0], y)[1]:.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(make_text(f"{y:,.6g}", LEFT - 6, float(at) + 4, "end"))
    for x in x_ticks:
        parts.append(make_text(f"{x:,.6g}", place(x, y_range[0])[0], HEIGHT - BOTTOM + 16))
    for i, points in enumerate(shown.values()):
        path = [f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points)]
        parts.append(f'<polyline class="line{i % 4}" points="{" ".join(path)}"/>')
        if len(points) <= MAX_DOTS:
            parts += [f'<circle class="line{i % 4}" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>'
                      for a, b in (place(*point) for point in points)]  # fmt: skip
    parts.append(make_text(x_name, (LEFT + WIDTH) / 2, HEIGHT - 6))
    middle = (HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90)">{make_text(unit, -middle, 12)}</g>')
    legend = " ".join(
        f'<span class="key"><svg viewBox="0 0 20 8" aria-hidden="true"><line class="line{i % 4}" '
        f'x1="0" x2="20" y1="4" y2="4"/></svg> {html.escape(describe_line(name, points))}</span>'
        for i, (name, points) in enumerate(shown.items())
    )
    name = html.escape(f"{title}: {'; '.join(describe_line(*line) for line in shown.items())}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
        f"<figcaption>{html.escape(title)}. {legend}</figcaption></figure>"
    )


def make_text(text: str, x: float, y: float, anchor: str = "middle") -> str:
    """Return a label of a chart."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def describe_line(name: str, points: Points) -> str:
    """Return a line in words: where it begins and ends."""
    (first, start), (last, end) = points[0], points[-1]
    ends = f"{format_number(start)} at {first:,.6g} to {format_number(end)} at {last:,.6g}"
    return f"{name}, {ends}"


def format_number(value: float) -> str:
    """Return a number with four digits or more, without an exponent where it is large.

    >>> format_number(34390.6), format_number(3.32595)
    ('34,391', '3.326')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thin_out(points: Points) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, the first and the last among them."""
    if len(points) <= MAX_POINTS:
        return list(points)
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(i * step)] for i in range(MAX_POINTS)]


def choose_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers between two values, about `count`; two at least.

    >>> choose_ticks(0, 600), choose_ticks(3.3, 7.7)
    ([0.0, 200.0, 400.0, 600.0], [4.0, 5.0, 6.0, 7.0])
    """
    if high <= low:
        margin = abs(low) / 2 or 1.0
        low, high = low - margin, low + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * x for x in (1, 2, 5, 10) if power * x >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [round(i * step, 12) for i in range(first, last + 1)]
    return ticks if len(ticks) > 1 else [low, high]
