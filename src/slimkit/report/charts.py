"""Charts of a report: inline SVG drawn by matplotlib, coloured by the page's own CSS.

matplotlib writes plain colours; each is replaced afterwards by a CSS variable of the page, so
that one picture serves light and dark. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from slimkit.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ChartPoint", "curves", "histograms", "scatter", "training_curves"]

INK, MUTED, RULE, ACCENT, PAPER = "#101112", "#707172", "#d0d1d2", "#3061c2", "#fefdfc"
BAD = "#b33620"
VARIABLES = {
    INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", PAPER: "paper", BAD: "bad"
}  # fmt: skip

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
}


@dataclass(frozen=True)
class ChartPoint:
    """One variant in a scatter picture.

    Attributes:
        label: written beside the point.
        cost: its place on the horizontal axis.
        score: its place on the vertical axis.
        interval: of the score, drawn as a thin line; None where it is not known.
    """

    label: str
    cost: float
    score: float
    interval: tuple[float, float] | None = None


def _figure(name: str, width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    return figure, axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element that can stand in a page beside others."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's own font draws the text
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'<g id="(?!m[0-9a-f]{10}|p[0-9a-f]{10})[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r"font-family: (?!inherit)[^;\"]*", "font-family: inherit", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    size = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg role="img" aria-label="{escape(title)}" {size.group() if size else ""}>'
    body = svg[svg.index(">") + 1 :]
    return "\n".join(line for line in (head + body).splitlines() if line.strip())


def _literal(text: str) -> str:
    """``text`` as it is: matplotlib reads what stands between two ``$`` as a formula."""
    return text.replace("$", r"\$")


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Move ``values`` apart as little as needed for neighbours to be ``gap`` away.

    Neighbours that are too close form a block, which is centred on where its members were.
    """
    order = sorted(range(len(values)), key=lambda number: values[number])
    blocks: list[tuple[float, list[int]]] = []
    for number in order:
        blocks.append((values[number], [number]))
        while len(blocks) > 1:
            (low, low_members), (high, high_members) = blocks[-2:]
            needed = gap * (len(low_members) + len(high_members)) / 2
            if high - low >= needed:
                break
            members = low_members + high_members
            middle = sum(values[member] for member in members) / len(members)
            blocks[-2:] = [(middle, members)]
    result = [0.0] * len(values)
    for middle, members in blocks:
        for place, member in enumerate(members):
            result[member] = middle + gap * (place - (len(members) - 1) / 2)
    return result


def _score_limits(
    scores: Sequence[float], interval: tuple[float | None, float | None]
) -> tuple[float, float]:
    """A vertical range that shows the differences without making noise look like cliffs.

    A hundredth of the interval that the scores can be in is the least that is shown; of one
    that is open, a twentieth of the largest score.
    """
    low, high = min(scores), max(scores)
    lowest, highest = interval
    if lowest is None or highest is None:
        least = 0.05 * max(abs(low), abs(high)) or 1.0
    else:
        least = (highest - lowest) / 100
    room = max(high - low, least)
    bottom, top = low - 0.35 * room, high + 0.35 * room
    return bottom, top if highest is None else min(top, highest + 0.05 * room)


def scatter(
    points: Sequence[ChartPoint],
    *,
    name: str,
    horizontal: str,
    vertical: str,
    scale: float = 1.0,
    interval: tuple[float | None, float | None] = (0.0, 100.0),
) -> str:
    """Score against cost: the baseline hollow, every point labelled where it is.

    What costs more than the baseline has the colour of worse.

    Args:
        points: the first one is the baseline.
        name: unique among the pictures of a page; the SVG's internal names derive from it.
        horizontal: the label of the cost axis, with its unit.
        vertical: the label of the score axis.
        scale: costs are divided by it (1000 for bytes shown in kB).
        interval: that scores can be in; None where it is open.

    Returns:
        An ``<svg>`` element.
    """
    figure, (axes,) = _figure(name, 5.2, 3.5)
    costs = [point.cost / scale for point in points]
    scores = [point.score for point in points]
    axes.set_xlim(0, 1.08 * max(costs))
    shown = [end for point in points for end in point.interval or ()]
    axes.set_ylim(*_score_limits([*scores, *shown], interval))
    axes.axhline(scores[0], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    for cost, point in zip(costs, points, strict=True):
        if point.interval is not None:
            axes.vlines(cost, *point.interval, color=MUTED, linewidth=1.0, zorder=2)
    colours = [BAD if cost > costs[0] else ACCENT for cost in costs[1:]]
    axes.scatter(costs[1:], scores[1:], s=46, color=colours, zorder=3)
    axes.scatter(costs[:1], scores[:1], s=46, facecolor=PAPER, edgecolor=INK, lw=1.5, zorder=3)
    low, high = axes.get_ylim()
    places = _spread(scores, 0.075 * (high - low))
    for number, point in enumerate(points):
        right = costs[number] > 0.55 * max(costs)
        moved = abs(places[number] - scores[number]) > 0.01 * (high - low)
        axes.annotate(
            _literal(point.label),
            (costs[number], scores[number]),
            xytext=(-9 if right else 9, 72 * 3.0 * (places[number] - scores[number]) / (high - low))
            if moved
            else (-9 if right else 9, 7),
            textcoords="offset points",
            ha="right" if right else "left",
            va="center",
            color=MUTED if number == 0 else INK,
        )
    axes.set_xlabel(_literal(horizontal))
    axes.set_ylabel(_literal(vertical))
    told = "; ".join(
        f"{point.label} {point.score:.4g} at {cost:.3g}"
        for point, cost in zip(points, costs, strict=True)
    )
    return _svg(figure, name, f"{vertical} against {horizontal}: {told}")


def training_curves(
    history: Sequence[Mapping[str, Any]], *, name: str, metric: str, label: str, digits: int = 2
) -> str:
    """Loss and metric over the epochs of one stage.

    Args:
        history: one mapping per epoch with ``loss`` and, where it was evaluated, ``metrics``.
        name: unique among the pictures of a page.
        metric: the metric to draw, a key of ``metrics``.
        label: how the metric is written.
        digits: of it, behind the point.

    Returns:
        An ``<svg>`` element; empty when there are no two epochs to draw a line between.
    """
    epochs = [float(row.get("epoch", number)) for number, row in enumerate(history)]
    shift = 1.0 - min(epochs, default=1.0)  # people count epochs from one
    losses = [
        (e + shift, row["loss"])
        for e, row in zip(epochs, history, strict=True)
        if row.get("loss") is not None
    ]
    scores = [
        (e + shift, row["metrics"][metric])
        for e, row in zip(epochs, history, strict=True)
        if metric in (row.get("metrics") or {})
    ]
    panels = [(title, rows) for title, rows in (("loss", losses), (label, scores)) if len(rows) > 1]
    if not panels:
        return ""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(name, 2.7 * len(panels), 2.1, len(panels))
    for panel, (title, rows) in zip(axes, panels, strict=True):
        x, y = [row[0] for row in rows], [row[1] for row in rows]
        panel.plot(x, y, color=ACCENT, marker="o" if len(rows) < 5 else None, markersize=4)
        written = words.score(y[-1], digits) if title == label else f"{y[-1]:.3g}"
        panel.set_title(_literal(f"{title}, last {written}"), loc="left", color=MUTED)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.set_xlabel("epoch")
    told = "; ".join(
        f"{title} from {rows[0][1]:.3g} to {rows[-1][1]:.3g}" for title, rows in panels
    )
    return _svg(figure, name, f"over {len(epochs)} epochs: {told}")


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], *, name: str, x: str, y: str
) -> str:
    """Some curves over one axis, told apart by their strokes.

    Args:
        series: name → points.
        name: unique among the pictures of a page.
        x: label of the horizontal axis.
        y: label of the vertical axis.

    Returns:
        An ``<svg>`` element.
    """
    figure, (axes,) = _figure(name, 5.2, 3.5)
    strokes = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
    for number, (label, points) in enumerate(series.items()):
        colour = ACCENT if number == len(series) - 1 else MUTED
        stroke: Any = strokes[(len(series) - 1 - number) % len(strokes)]
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        axes.plot(xs, ys, label=_literal(label), color=colour, linestyle=stroke)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    axes.set_xlabel(_literal(x))
    axes.set_ylabel(_literal(y))
    return _svg(figure, name, f"{y} over {x}: {', '.join(series)}")


def histograms(row: Mapping[str, Any], *, name: str) -> str:
    """Weights and outputs of one layer before rounding (filled) and after (a line).

    Args:
        row: ``weights`` and ``outputs``, each with ``low``, ``high`` and counts ``before`` and
            ``after`` in bins of equal width.
        name: unique among the pictures of a page.

    Returns:
        An ``<svg>`` element. Counts are on a logarithmic scale, so that tails show.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(name, 5.4, 1.5, 2)
    for panel, title in zip(axes, ("weights", "outputs"), strict=True):
        part = row[title]
        bins = len(part["before"])
        edges = [part["low"] + (part["high"] - part["low"]) * n / bins for n in range(bins + 1)]
        panel.stairs(part["before"], edges, baseline=0.5, fill=True, color=RULE)
        panel.stairs(part["after"], edges, baseline=0.5, color=ACCENT, linewidth=1.1)
        panel.set_yscale("log")
        panel.set_ylim(bottom=0.5)
        panel.yaxis.set_ticks([])
        panel.yaxis.set_ticks([], minor=True)
        panel.spines["left"].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(visible=False)
        panel.set_title(title, loc="left", color=MUTED)
    return _svg(figure, name, f"weights and outputs of {row['layer']}")
