"""The report's figures as SVG: themed for an HTML page (its colours follow light and dark) or standalone.

Matplotlib, which takes half a second, is imported where something is drawn: every job describes plots.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette: told apart by colour-blind readers too.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, GRID = "#1f2328", "#d7dbe0"
_NAMED_LINES = 8  # of curves that a legend within the axes has room for
_DOTS_SPAN = 5  # times the distance from the best to the middle: how far to the left Dots go
STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curves:
    """Lines over epochs or steps: name -> points (x, y). NaN points leave a gap.

    logarithmic  whether the y axis is; points at 0 or below it leave a gap too
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Reliability:
    """Per bin of predicted probability: its mean, the share of positives seen, and how many rows."""

    title: str
    predicted: Sequence[float]
    observed: Sequence[float]
    rows: Sequence[int]


@dataclass(frozen=True)
class Bars:
    """Groups of bars: name -> a height per group; NaN leaves its place empty."""

    title: str
    y_label: str
    groups: Sequence[str]
    heights: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Ranking:
    """Horizontal bars, the longest first: name -> length."""

    title: str
    x_label: str
    names: Sequence[str]
    lengths: Sequence[float]


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates: an axis per setting, a line per trial, coloured by `values`.

    columns    setting -> its value of each trial; numbers lie to scale, anything else evenly
    logarithmic  settings whose axis is
    best       the trial that is drawn on top, with marks
    """

    title: str
    value_label: str
    columns: Mapping[str, Sequence[Any]]
    logarithmic: frozenset[str]
    values: Sequence[float]
    best: int | None


@dataclass(frozen=True)
class Fans:
    """Many lines of which only the last matters: it is drawn in colour over the others. x is logarithmic."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Dots:
    """A line per name, the largest value on top: each series' point, with a whisker of its spread if any.

    points  series -> name -> (value, spread), none empty; a name tells the value of its first series
    marks   what -> value: vertical lines
    """

    title: str
    x_label: str
    points: Mapping[str, Mapping[str, tuple[float, float]]]
    marks: Mapping[str, float]


Plot = Curves | Reliability | Bars | Ranking | Parallel | Fans | Dots


def svg(plot: Plot, themed: bool = False) -> str:
    """The figure as an <svg> element; `themed` replaces its colours by the page's CSS variables."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": plot.title}):  # ids differ between figures of one page
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        match plot:
            case Curves():
                _draw_curves(axes, plot)
            case Reliability():
                _draw_reliability(axes, plot)
            case Bars():
                _draw_bars(axes, plot)
            case Ranking():
                _draw_ranking(axes, plot)
            case Parallel():
                _draw_parallel(axes, plot)
            case Fans():
                _draw_fans(axes, plot)
            case Dots():
                _draw_dots(axes, plot)
        axes.set_title(plot.title, loc="left", fontsize=12, fontweight="bold", pad=10)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=themed, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return _themed(text) if themed else text


def save(plot: Plot, directory: Path) -> Path:
    """Write the figure as a standalone SVG file named after its title."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / (re.sub(r"\W+", "_", plot.title.lower()).strip("_") + ".svg")
    path.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + svg(plot))
    return path


def _draw_curves(axes: Axes, plot: Curves) -> None:
    for color, (name, points) in zip(_cycle(len(plot.lines)), plot.lines.items(), strict=True):
        x, y = [p[0] for p in points], [p[1] for p in points]
        marker = "o" if len(points) <= 30 else None
        axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.8, label=name)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, yscale="log" if plot.logarithmic else "linear")
    axes.locator_params(axis="x", integer=True)
    if len(plot.lines) > _NAMED_LINES:  # as many layers: below the axes, which grow by it and not shrink
        figure: Any = axes.get_figure(root=True)
        figure.set_figheight(figure.get_figheight() + 0.13 * -(-len(plot.lines) // 3))
        figure.legend(fontsize=6, loc="outside lower center", ncols=3)
    elif len(plot.lines) > 1:
        axes.legend()


def _draw_reliability(axes: Axes, plot: Reliability) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="perfectly calibrated")
    most = max(plot.rows, default=1)
    sizes = [12 + 140 * math.sqrt(rows / most) for rows in plot.rows]
    axes.plot(plot.predicted, plot.observed, color=SERIES[0], linewidth=1.2)
    axes.scatter(
        plot.predicted, plot.observed, s=sizes, color=SERIES[0], alpha=0.75, label="model (area: rows)"
    )
    axes.set(xlabel="predicted probability", ylabel="share of positives seen", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left", markerscale=0.6)


def _draw_bars(axes: Axes, plot: Bars) -> None:
    width = 0.8 / max(len(plot.heights), 1)
    for i, (name, heights) in enumerate(plot.heights.items()):
        places = [group + (i - (len(plot.heights) - 1) / 2) * width for group in range(len(plot.groups))]
        bars = axes.bar(places, heights, width * 0.92, color=SERIES[i % len(SERIES)], label=name)
        labels = ["" if math.isnan(height) else f"{height:.3f}" for height in heights]
        axes.bar_label(bars, labels, fontsize=9, padding=2)
    axes.set_xticks(range(len(plot.groups)), plot.groups)
    axes.set_ylabel(plot.y_label)
    axes.margins(y=0.22)
    axes.legend(loc="upper left", ncols=2)


def _draw_ranking(axes: Axes, plot: Ranking) -> None:
    places = range(len(plot.names))
    bars = axes.barh(places, plot.lengths, 0.7, color=SERIES[0])
    axes.bar_label(bars, [f"{length:.2f}" for length in plot.lengths], fontsize=9, padding=2)
    axes.set_yticks(places, plot.names)
    axes.invert_yaxis()
    axes.set_xlabel(plot.x_label)
    axes.grid(False)
    axes.margins(x=0.12)


def _draw_parallel(axes: Axes, plot: Parallel) -> None:
    scales = [_scale(column, name in plot.logarithmic) for name, column in plot.columns.items()]
    shade = _shade(plot.values)
    order = sorted(range(len(plot.values)), key=lambda trial: (trial == plot.best, plot.values[trial]))
    places = range(len(scales))
    for trial in order:
        heights = [positions[trial] for positions, _ in scales]
        best = trial == plot.best
        axes.plot(
            places,
            heights,
            color=SERIES[1] if best else SERIES[0],
            alpha=1 if best else shade[trial],
            linewidth=2.2 if best else 1.2,
            marker="o" if best else None,
            markersize=4,
        )
    for place, (_, ticks) in zip(places, scales, strict=True):
        axes.axvline(place, color=GRID, linewidth=1, zorder=0)
        for height, text in ticks:
            axes.annotate(
                text, (place, height), (3, 0), textcoords="offset points", fontsize=8, va="center"
            ).set_bbox({"facecolor": "none", "edgecolor": "none", "pad": 0})
    axes.set_xticks(places, [name.replace(".", ".\n") for name in plot.columns], fontsize=8)
    axes.set_yticks([])
    axes.set_ylabel(f"darker: better {plot.value_label};\norange: the best trial", fontsize=9)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(-0.2, len(scales) - 0.4), ylim=(-0.06, 1.06))


def _scale(column: Sequence[Any], logarithmic: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Height in [0, 1] of each value of an axis, and its ticks."""
    numbers = [v for v in column if isinstance(v, int | float) and not isinstance(v, bool)]
    continuous = logarithmic or len(set(numbers)) > 6 or any(isinstance(v, float) for v in numbers)
    if len(numbers) == len(column) and continuous:
        along = [math.log(v) if logarithmic else float(v) for v in numbers]
        low, span = min(along), (max(along) - min(along)) or 1.0
        ends = {0.0: min(numbers), 1.0: max(numbers)}
        return [(v - low) / span for v in along], [(height, f"{v:.3g}") for height, v in ends.items()]
    names = {_text(v): v for v in column}
    kinds = sorted(
        names, key=lambda name: (isinstance(names[name], str), str(type(names[name])), names[name])
    )
    step = 1 / max(len(kinds) - 1, 1)
    heights = {kind: i * step for i, kind in enumerate(kinds)}
    return [heights[_text(v)] for v in column], [(height, kind) for kind, height in heights.items()]


def _text(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _shade(values: Sequence[float]) -> list[float]:
    """Opacity by rank, so that one outlier does not make all others look alike."""
    ranked = sorted(values)
    return [0.15 + 0.65 * ranked.index(value) / max(len(values) - 1, 1) for value in values]


def _draw_fans(axes: Axes, plot: Fans) -> None:
    *others, top = plot.lines
    for line in others:
        axes.plot(
            *zip(*line, strict=True), color=SERIES[0], alpha=0.35, linewidth=1.2, marker="o", markersize=3
        )
    axes.plot(*zip(*top, strict=True), color=SERIES[1], linewidth=2.2, marker="o", markersize=5, label="best")
    axes.set_xscale("log", base=2)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="lower right")


def _draw_dots(axes: Axes, plot: Dots) -> None:
    first: dict[str, float] = {}
    for series in plot.points.values():
        first = {name: value for name, (value, _) in series.items()} | first
    names = sorted(first, key=first.__getitem__)
    for (what, value), style in zip(plot.marks.items(), (":", "--", "-.", "-"), strict=False):
        axes.axvline(value, color=INK, linewidth=1, linestyle=style, label=what)
    for color, (label, series) in zip(_cycle(len(plot.points)), plot.points.items(), strict=True):
        values, spreads = zip(*series.values(), strict=True)
        places = [names.index(name) for name in series]
        axes.errorbar(
            values, places, xerr=spreads, fmt="o", color=color, markersize=4, capsize=3, label=label
        )
    top, middle = first[names[-1]], first[names[(len(names) - 1) // 2]]
    edge = top - _DOTS_SPAN * (top - middle)
    if first[names[0]] < edge:  # what is far behind would press the others together; its name has its value
        right = max(axes.dataLim.x1, *plot.marks.values(), top)
        axes.set_xlim(edge, right + 0.05 * (right - edge))
    axes.set_yticks(range(len(names)), [f"{name}  {first[name]:.4f}" for name in names], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(xlabel=plot.x_label, ylim=(-0.6, len(names) - 0.4))
    axes.grid(True, axis="both")
    axes.get_figure(root=True).legend(fontsize=8, loc="outside lower center", ncols=3)  # type: ignore[union-attr]


def _cycle(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _themed(text: str) -> str:
    for i, color in enumerate(SERIES):
        text = text.replace(color, f"var(--series-{i})")
    text = re.sub(r'(?<=<svg )(.*?)width="[\d.]+pt" height="[\d.]+pt"', r"\1", text, count=1, flags=re.DOTALL)
    text = re.sub(r"(?<!font-)family: [^;\"]+", "family: inherit", text)
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")
