"""What happened during a run, as numbers and as plots: the trace of its steps and the map of the trim."""

from __future__ import annotations

import csv
import io
import re
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from erase_sd.common.files import write_atomic
from erase_sd.common.plotting import FORGET, INK, QUIET, REDIRECT, RETAIN, tidy, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {  # layer kind -> pattern in a parameter's name, colour; the first match counts
    "self-attention": (r"\.attn1\.", RETAIN),
    "cross-attention": (r"\.attn2\.", FORGET),
    "feed-forward": (r"\.ff\.", REDIRECT),
    "residual": (r"\.resnets\.", "#66a182"),
    "other": (r"", QUIET),
}
LOSSES = {  # column of a trace -> label, colour; other losses have no colours of their own
    "loss": ("objective", INK),
    "loss_r": ("retain", RETAIN),
    "loss_f": ("forget", FORGET),
    "loss_o": ("objective", REDIRECT),
}
TITLES = {  # column -> title of its panel; flags are shown as shares
    "cos": r"$\cos(g_r, g_f)$",
    "c": r"coefficient $c$ of $g_f$",
    "bit": "steps so far in which the projection bit, %",
    "ceiling": "steps so far above the ceiling, %",
    "lr": "learning rate",
}


def write_trace(folder: str | Path, rows: list[dict]) -> None:
    """Write folder/trace.csv and trace.png from the records of a method's steps, one row each; nothing without rows.

    Every column with a value is plotted over `step`: those named loss* together, each other one in a panel of its own,
    flags as the share of steps so far in which they were set. None stands for no value. One row makes no plot,
    nor do rows of `step` alone.
    """
    if not rows:
        return
    _write_csv(Path(folder) / "trace.csv", rows)
    panels = _panels(rows)
    if panels and len(rows) > 1:
        _plot_trace(Path(folder) / "trace.png", rows, panels)


def _panels(rows: list[dict]) -> list[list[str]]:
    """Return the columns of each panel: all losses in the first one, every other column in its own."""
    losses: list[str] = []
    others: list[list[str]] = []
    for key in _columns(rows):
        if key == "step" or not _values(rows, key):
            continue
        if key.startswith("loss"):
            losses.append(key)
        else:
            others.append([key])
    return [losses, *others] if losses else others


def _plot_trace(path: Path, rows: list[dict], panels: list[list[str]]) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3 * height), layout="constrained")
    grid = list(figure.subplots(height, 2, squeeze=False).flat)
    for axes, keys in zip(grid, panels, strict=False):
        first = keys[0]
        tidy(axes, "losses" if first.startswith("loss") else TITLES.get(first, first))
        for key in keys:
            label, colour = LOSSES.get(key, (key, INK if len(keys) == 1 else None))
            _line(axes, rows, key, label, colour)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels) :]:
        axes.remove()
    write_png(path, figure)


def write_saliency(folder: str | Path, changed: dict[str, int], sizes: dict[str, int]) -> None:
    """Write folder/saliency.csv (every parameter) and saliency.png (blocks of the network in order of use).

    `changed` has the number of entries really re-initialised and `sizes` the number of entries, by parameter name.
    A bar is the share of its block's entries that changed; a parameter missing from `changed` has 0.
    """
    from matplotlib.figure import Figure

    rows: list[dict] = []
    entries: dict[str, int] = {}
    for name, size in sizes.items():
        count = changed.get(name, 0)
        rows.append({"parameter": name, "entries": size, "changed": count, "share": count / size})
        entries[_block(name)] = entries.get(_block(name), 0) + size
    _write_csv(Path(folder) / "saliency.csv", rows)
    entries = dict(sorted(entries.items(), key=_order_of_use))
    counts = _changed_by_kind(changed, list(entries))
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(entries)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, entries, counts)
    total, whole = sum(changed.values()), sum(sizes.values())
    tidy(axes, f"{total:,} of {whole:,} entries re-initialised ({_percent(100 * total / whole)})")
    write_png(Path(folder) / "saliency.png", figure)


def _changed_by_kind(changed: dict[str, int], blocks: list[str]) -> dict[str, dict[str, int]]:
    """Return {kind of layer: {block: changed entries}} of the kinds in which anything changed."""
    counts: dict[str, dict[str, int]] = {}
    for kind in KINDS:
        counts[kind] = dict.fromkeys(blocks, 0)
    for name, count in changed.items():
        counts[_kind(name)][_block(name)] += count
    for kind in KINDS:
        if not any(counts[kind].values()):
            del counts[kind]
    return counts


def _bars(axes: Axes, entries: dict[str, int], counts: dict[str, dict[str, int]]) -> None:
    """Plot one bar per block, stacked by layer kind, with the number of changed entries written at its end."""
    from matplotlib.ticker import FuncFormatter

    ends = [0.0] * len(entries)
    for kind, blocks in counts.items():
        widths = [100 * blocks[block] / size for block, size in entries.items()]
        axes.barh(range(len(entries)), widths, left=list(ends), color=KINDS[kind][1], height=0.7, label=kind)
        for row, width in enumerate(widths):
            ends[row] += width
    for row, block in enumerate(entries):
        number = 0
        for blocks in counts.values():
            number += blocks[block]
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{number:,}", (ends[row], row), fontsize=9, color=INK, **place)
    axes.set_yticks(range(len(entries)), list(entries))
    axes.set_ylim(len(entries) - 0.3, -0.7)
    axes.set_xlim(0, 1.12 * max(ends) or 1)
    axes.set_xlabel("share of the block's entries; at the bar's end their number")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    if len(counts) > 1:
        axes.legend(frameon=False, fontsize=9)


def _block(parameter: str) -> str:
    """Return the part of the network of a parameter: "down_blocks.1.attentions.0.norm.bias" -> "down_blocks.1"."""
    return re.match(r"[^.]+(\.\d+)?", parameter)[0]


def _order_of_use(entry: tuple[str, int]) -> bool:
    """Return what sorts blocks in order of use: diffusers registers a UNet's middle after its up blocks."""
    return entry[0].startswith(("up_blocks", "conv_norm_out", "conv_out"))


def _kind(parameter: str) -> str:
    for kind, (pattern, _) in KINDS.items():
        if re.search(pattern, parameter):
            return kind
    return "other"


def _percent(value: float) -> str:
    return f"{value:.3g} %"


def _columns(rows: list[dict]) -> list[str]:
    """Return the names of all columns, in the order in which they first appear."""
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def _values(rows: list[dict], key: str) -> list[tuple[int, float | bool]]:
    """Return (step, value) of every row that has a value in this column."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _line(axes: Axes, rows: list[dict], key: str, label: str, colour: str | None) -> None:
    """Plot a column over the steps; the share of True so far of a flag, in percent."""
    steps, values = zip(*_values(rows, key), strict=True)
    if isinstance(values[0], bool):
        values = [100 * total / n for n, total in enumerate(accumulate(values), start=1)]
        axes.set_ylim(-3, 103)
    axes.plot(steps, values, color=colour, linewidth=1.4, label=label, marker="o" if len(steps) == 1 else None)


def _write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
