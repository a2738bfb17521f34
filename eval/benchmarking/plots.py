"""The benchmark's plots: erasure against retention, and what every method samples for the same prompts and seeds."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from safetensors.torch import load_file

from erase_sd.common.files import write_atomic
from erase_sd.common.imaging import sheet
from erase_sd.common.plotting import FORGET, INK, QUIET, RETAIN, tidy, write_png
from eval.benchmarking.aggregate import MethodScore, pareto, retention
from eval.benchmarking.rows import BenchmarkRow
from eval.benchmarking.suites import ORIGINAL
from eval.benchmarking.trial import captions_shown, features_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = 0.045  # of the panel's height: labels are at least so far apart
FLOOR = (
    60  # %: what retains less is plotted there, with its number, so that one ruin does not press the others together
)


def tradeoff(board: Sequence[MethodScore], file: Path) -> None:
    """Write a plot of UA against retention: a dot a method, faint ones its concepts; the Pareto front is joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    whole = [s for s in board if s.concept is None]
    methods = [s for s in whole if s.method != ORIGINAL]
    best = pareto(whole)
    for s in board:
        if s.method != ORIGINAL and s.concept:
            axes.plot(s.values["ua"], _height(s), ".", color=_colour(s, best), alpha=0.3, markersize=5)
    ends = []
    for s in methods:
        fill = "full" if s.method in best else "none"
        mark = "o" if retention(s) >= FLOOR else "v"
        point = (s.values["ua"], _height(s))
        axes.plot(*point, mark, color=_colour(s, best), clip_on=False, markersize=9, fillstyle=fill)
        if s.method in best:
            ends.append(point)
    ends.sort()
    axes.step([x for x, _ in ends], [y for _, y in ends], color=QUIET, where="pre", zorder=0)
    for s in whole:
        if s.method == ORIGINAL:
            axes.axhline(retention(s), color=INK, linestyle="--", linewidth=0.8, label="original model's retention")
            axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.set_xlim(-3, 103)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, FLOOR), min(high, 101))
    axes.set_xlabel("erasure: UA, % (filled: on the Pareto front)")
    tidy(axes, "Erasure and retention, mean of IRA and CRA, %")
    _labels(axes, methods, best)
    write_png(file, figure)


def _colour(s: MethodScore, best: set[str]) -> str:
    return FORGET if s.method in best else RETAIN


def _height(s: MethodScore) -> float:
    return max(retention(s), FLOOR)


def _labels(axes: Axes, methods: list[MethodScore], best: set[str]) -> None:
    """Write names at the right edge in the order of their dots, apart enough to be read, each joined to its dot."""
    low, high = axes.get_ylim()
    place = 1.0
    for s in sorted(methods, key=retention, reverse=True):
        place = min(place, (_height(s) - low) / (high - low))
        axes.annotate(
            s.method if retention(s) >= FLOOR else f"{s.method}: {retention(s):.0f} %",
            (s.values["ua"], _height(s)),
            (1.03, place),
            textcoords="axes fraction",
            fontsize=9,
            color=_colour(s, best),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.7, "shrinkB": 5, "relpos": (0, 0.5)},
        )
        place -= LINE


def grid(rows: Sequence[BenchmarkRow], folder: Path) -> bool:
    """Write grid.png: a row a method, columns the same prompts and seeds of every concept, all of the first seed.

    Samples stay in .cache: methods of which some are gone are left out, and named. Return whether none is.
    """
    first = min(row.seed for row in rows)
    concepts: list[str] = []
    titles: list[str] = []
    files: dict[str, dict[str, Path]] = {}  # of a method's rows, by concept
    for row in rows:
        if row.seed != first:
            continue
        if row.method == ORIGINAL:
            concepts.append(row.concept)
            titles += captions_shown(row)
        files.setdefault(row.method, {})[row.concept] = features_file(row, folder)
    lines: dict[str, list[Image.Image]] = {}
    missing: list[str] = []
    for method, found in files.items():
        if not all(concept in found and found[concept].is_file() for concept in concepts):
            missing.append(method)
            continue
        lines[method] = []
        for concept in concepts:
            for pixels in load_file(found[concept])["shown"]:
                lines[method].append(Image.fromarray(pixels.numpy()))
    if missing:
        text = f"grid.png is without {', '.join(missing)}: not all of their samples are in {folder}/.cache"
        print(text, file=sys.stderr)
    if lines and concepts:
        picture = io.BytesIO()
        sheet(list(lines.values()), list(lines), titles, scale=3).save(picture, "png", optimize=True)
        write_atomic(folder / "grid.png", picture.getvalue())
    return not missing
