"""Charts as inline SVG whose colours are names: the page's CSS says what they look like, so they follow light and dark."""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

EXPERT_COLOURS, ROUND_COLOURS = 7, 6
MOST_POINTS = 240  # of one curve: more cannot be told apart at this size, and each is bytes
BINS, TAIL = 32, 0.02
ROUND_TICKS = [1, 2, 2.5, 5, 10]  # 50, 60, 70 and not 48, 56, 64

_NAMES = ("ink", "muted", "line", "card", "good", "bad",
          *(f"expert-{n}" for n in range(EXPERT_COLOURS)), *(f"round-{n}" for n in range(ROUND_COLOURS)))
# matplotlib knows no CSS variables: a colour is drawn as a placeholder, and replaced in the text of the SVG.
_PLACEHOLDERS = {name: f"#fa00{number:02x}" for number, name in enumerate(_NAMES)}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _PLACEHOLDERS["line"], "axes.grid": True,
    "axes.axisbelow": True, "grid.color": _PLACEHOLDERS["line"], "grid.linewidth": 0.6,
    "axes.labelcolor": _PLACEHOLDERS["muted"],
    "xtick.color": _PLACEHOLDERS["line"], "ytick.color": _PLACEHOLDERS["line"], "xtick.labelcolor": _PLACEHOLDERS["muted"],
    "ytick.labelcolor": _PLACEHOLDERS["muted"], "xtick.major.size": 0, "ytick.major.size": 0, "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-6, 7), "path.simplify": True,
}


@dataclass(frozen=True)
class Points:
    """A curve of means, each with its interval; hollow marks are for what was only watched."""

    colour: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    hollow: bool = False


def intervals(
    lines: Sequence[Points], *, y: str, about: str, level: float | None = None, x: str = "round", falling: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> Markup:
    """Curves with an interval bar at each point; `level` is where nothing has changed. falling: x runs from
    high to low.

    ticks: y -> what stands there, where y itself is not what is told.
    """

    def draw(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=_PLACEHOLDERS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for line in lines:
            colour = _PLACEHOLDERS[line.colour]
            face: dict[str, Any] = {"markerfacecolor": _PLACEHOLDERS["card"]} if line.hollow else {}
            axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.4, alpha=0.55)
            axes.plot(line.x, line.y, color=colour, linewidth=1.4, marker="o", markersize=4.5, **face)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(False, axis="x")
        if falling:
            axes.invert_xaxis()

    return _svg(draw, x, y, about, ticks)


@dataclass(frozen=True)
class Mark:
    """A point with a word beside it; hollow ones are what the others are compared with."""

    colour: str
    x: float
    y: float
    label: str = ""
    hollow: bool = False


def plane(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], marks: Sequence[Mark], *, x: str, y: str, about: str, costs: bool = False
) -> Markup:
    """Points in a plane, and lines (colour, x, y) through some of them. costs: x is a number of calls, told
    on a scale of doublings.
    """

    def draw(axes: Axes) -> None:
        for colour, across, up in lines:
            axes.plot(across, up, color=_PLACEHOLDERS[colour], linewidth=1.4, alpha=0.7)
        for mark in marks:
            colour = _PLACEHOLDERS[mark.colour]
            axes.plot([mark.x], [mark.y], "o", markersize=5, color=colour,
                      markerfacecolor=_PLACEHOLDERS["card"] if mark.hollow else colour, zorder=3)
            axes.annotate(mark.label, (mark.x, mark.y), (5, 4), textcoords="offset points", fontsize=8.5,
                          color=_PLACEHOLDERS["ink"])
        axes.margins(0.12)
        if costs:
            places = sorted({mark.x for mark in marks})
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(places))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{place:g}" for place in places]))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_TICKS))

    return _svg(draw, x, y, about, inches=(5.2, 3.2))


def outlines(values: Sequence[tuple[str, np.ndarray]], *, x: str, y: str, about: str) -> Markup:
    """Histograms over one another as outlines, in per cent of each; a triangle stands at each mean.

    The outer TAIL of all values on either side is in the bars at the ends: a few far ones must not squeeze the rest.
    """
    known = [(colour, found[np.isfinite(found)]) for colour, found in values]
    known = [(colour, found) for colour, found in known if len(found)]
    everything = np.concatenate([found for _, found in known]) if known else np.zeros(1)
    low, high = np.quantile(everything, [TAIL, 1 - TAIL])
    edges = np.histogram_bin_edges(everything, BINS, (low, high))

    def draw(axes: Axes) -> None:
        for number, (colour, found) in enumerate(known):
            share = 100 * np.histogram(np.clip(found, low, high), edges)[0] / len(found)
            last = number == len(known) - 1
            axes.stairs(share, edges, color=_PLACEHOLDERS[colour], linewidth=1.8 if last else 1.2)
            if last:
                axes.stairs(share, edges, color=_PLACEHOLDERS[colour], alpha=0.13, fill=True)
            axes.plot([np.clip(found.mean(), low, high)], [0], marker="^", markersize=6, color=_PLACEHOLDERS[colour], clip_on=False, zorder=3)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND_TICKS))
        axes.grid(False, axis="x")

    return _svg(draw, x, y, about)


def traces(lines: Sequence[tuple[str, list[np.ndarray]]], *, y: str, about: str, level: float | None = None) -> Markup:
    """Curves over optimiser steps, one array a round, laid end to end: pale as they are, strong as a running mean."""
    starts = np.cumsum([0, *(len(part) for part in lines[0][1])])

    def draw(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=_PLACEHOLDERS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for start in starts[1:-1]:
            axes.axvline(start - 0.5, color=_PLACEHOLDERS["line"], linewidth=1)
        for colour, parts in lines:
            for start, part in zip(starts, parts, strict=False):
                x, values = _thin(start + np.arange(len(part)), MOST_POINTS), _thin(part, MOST_POINTS)
                axes.plot(x, values, color=_PLACEHOLDERS[colour], linewidth=0.8, alpha=0.35)
                axes.plot(x, _smooth(values), color=_PLACEHOLDERS[colour], linewidth=1.7, marker="." if len(x) == 1 else "")
        for number, (start, end) in enumerate(itertools.pairwise(starts), 1):
            label = f"round {number}" if len(starts) < 6 else str(number)
            axes.text((start + end - 1) / 2, 1.02, label, ha="center", va="bottom", fontsize=9,
                      transform=axes.get_xaxis_transform(), color=_PLACEHOLDERS["muted"])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.grid(False, axis="x")

    return _svg(draw, "optimiser step", y, about)


def gains(values: np.ndarray, marked: Sequence[int], *, y: str, about: str) -> Markup:
    """Values from greatest to least as one skyline, above and below zero; dots mark those that are shown elsewhere."""
    edges = np.arange(len(values) + 1) + 0.5

    def draw(axes: Axes) -> None:
        axes.stairs(np.maximum(values, 0), edges, fill=True, color=_PLACEHOLDERS["good"], alpha=0.75)
        axes.stairs(np.minimum(values, 0), edges, fill=True, color=_PLACEHOLDERS["bad"], alpha=0.75)
        axes.axhline(0, color=_PLACEHOLDERS["muted"], linewidth=0.8)
        axes.plot(np.asarray(marked) + 1, np.zeros(len(marked)), "o", markersize=3.4, color=_PLACEHOLDERS["ink"])
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(False, axis="x")

    return _svg(draw, "held-out prompts, by gain", y, about)


def _thin(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many points, each the mean of its neighbours."""
    if len(values) <= most:
        return np.asarray(values, float)
    return np.array([part.mean() for part in np.array_split(values, most)])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the curve; shorter windows at its ends, so that nothing is made up."""
    reach = len(values) // 20
    total = np.cumsum([0.0, *values])
    low, high = (np.clip(np.arange(len(values)) + shift, 0, len(values)) for shift in (-reach, reach + 1))
    return (total[high] - total[low]) / (high - low)


def _svg(
    draw: Callable[[Axes], None], x: str, y: str, about: str, ticks: Mapping[float, str] | None = None,
    inches: tuple[float, float] = (3.5, 2.6),
) -> Markup:
    """An <svg> element of 72 units an inch that scales with its column; its text takes the page's font."""
    with rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        if ticks is None:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND_TICKS))
        else:
            axes.set_yticks(list(ticks), list(ticks.values()))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), about)


def _inline(text: str, about: str) -> Markup:
    """matplotlib's file as part of a page: only the element, short numbers, colours by name, no ids but those it refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)  # coordinates, not the labels
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r"> <", "><", re.sub(r"<g/>", "", text))
    for name, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(about)}"', 1))  # noqa: S704 - made above
