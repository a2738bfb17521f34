"""The benchmark's plots: what every method erased and kept, and what it samples for the same prompts and seeds."""

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
from erase_sd.common.plotting import INK, QUIET, RETAIN, tidy, write_png
from eval.benchmarking.aggregate import MethodScore, common
from eval.benchmarking.rows import BenchmarkRow
from eval.benchmarking.suites import ORIGINAL
from eval.benchmarking.trial import captions_shown, features_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "ua": "UA: the concept is gone, %",
    "ira": "IRA: others of its kind are kept, %",
    "cra": "CRA: other kinds are kept, %",
}
RUIN = 50  # %: what is below stands at the panel's edge, so that one ruin does not press the others together


def leaderboard(board: Sequence[MethodScore], file: Path) -> None:
    """Write a dot plot: methods as rows, the best harmonic mean above, rates as columns.

    Bars are Wilson's interval over pictures, numbers have the deviation over trainings; the original model is a line.
    """
    from matplotlib.figure import Figure

    whole = [s for s in board if s.concept is None]
    original = next((s for s in whole if s.method == ORIGINAL), None)
    methods = sorted((s for s in whole if s.method != ORIGINAL), key=lambda s: -s.values["mean"])
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        _rate(axes, methods, original, key)
        tidy(axes, title)
    names = [f"{s.method}   HM {_with_spread(s, 'mean')}" for s in methods]
    panels[0].set_yticks(range(len(methods)), names)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel(_caption(board, methods, original), fontsize=9, color=INK)
    write_png(file, figure)


def _rate(axes: Axes, methods: list[MethodScore], original: MethodScore | None, key: str) -> None:
    """Plot one rate of every method, with its number at the right edge."""
    shown = [s.values[key] for s in methods if s.values[key] >= RUIN]
    low = 10 * (min([*shown, 90]) // 10)
    for place, s in enumerate(methods):
        value = s.values[key]
        if value < low:
            axes.plot(low, place, "<", color=RETAIN, markersize=7, clip_on=False)
        else:
            left, right = s.interval[key]
            axes.plot((max(left, low), right), (place, place), color=RETAIN, linewidth=1.4, alpha=0.6)
            axes.plot(value, place, "o", color=RETAIN, markersize=6, clip_on=False)
        edge = axes.get_yaxis_transform()
        axes.text(1.06, place, _with_spread(s, key), transform=edge, va="center", fontsize=9, color=INK)
    if original is not None and original.values[key] >= low:
        axes.axvline(original.values[key], color=INK, linestyle="--", linewidth=0.9, zorder=0)
    axes.set_xlim(low, 100)
    axes.grid(axis="y", color=QUIET, linewidth=0.4)
    axes.tick_params(axis="y", length=0, pad=9)


def _with_spread(s: MethodScore, key: str) -> str:
    """Return a rate with its deviation over the trainings, where there are several."""
    spread = s.spread.get(key)
    return f"{s.values[key]:.1f}" if spread is None else f"{s.values[key]:.1f} ± {spread:.1f}"


def _caption(board: Sequence[MethodScore], methods: list[MethodScore], original: MethodScore | None) -> str:
    """Return what the plot is of: concepts, trainings, bars and marks."""
    concepts = common(board)
    fewest = min((s.runs for s in methods), default=0) // max(1, len(concepts))
    trainings = "one training each" if fewest == 1 else f"{fewest} trainings each, ±: their standard deviation"
    text = f"Mean over {', '.join(concepts)}; {trainings}. Bars: 95 % over pictures; a triangle: further left."
    if original is not None:
        rates = ", ".join(f"{key.upper()} {original.values[key]:.1f}" for key in PANELS)
        text += f"\nDashed: the original model ({rates})."
    return text


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
            titles += _titles(row)
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


def _titles(row: BenchmarkRow) -> list[str]:
    """Return the heading of every sample of a row: whether it is to be forgotten or kept, and its caption."""
    headings = []
    for asked, text in captions_shown(row):
        mark = f"FORGET {row.concept}:" if asked else f"KEEP, {row.concept} erased:"
        headings.append(f"{mark} {text}")
    return headings
