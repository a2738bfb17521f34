"""What happened during a run, as numbers and as pictures: the trace of its steps and the map of the trim."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from erase_sd.common.files import write_atomic
from erase_sd.common.plotting import FORGET, INK, QUIET, REDIRECT, RETAIN, tidy, write_png

KINDS = {  # layer kind -> pattern in a parameter's name, colour; the first match counts
    "self-attention": (r"\.attn1\.", RETAIN),
    "cross-attention": (r"\.attn2\.", FORGET),
    "feed-forward": (r"\.ff\.", REDIRECT),
    "residual": (r"\.resnets\.", "#66a182"),
    "other": (r"", QUIET),
}


LOSSES = {  # column of a trace -> label, colour; other losses are drawn without colours of their own
    "loss": ("objective", INK),
    "loss_r": ("retain", RETAIN),
    "loss_f": ("forget", FORGET),
    "loss_o": ("objective", REDIRECT),
}
TITLES = {  # column -> title of its panel; flags are drawn as shares
    "cos": r"$\cos(g_r, g_f)$",
    "c": r"coefficient $c$ of $g_f$",
    "bit": "steps so far in which the projection bit, %",
    "ceiling": "steps so far above the ceiling, %",
    "lr": "learning rate",
}


def write_trace(folder: str | Path, rows: list[dict]) -> None:
    """Write folder/trace.csv and trace.png from the records of a method's steps, one row each; nothing without rows.

    Rows of `step` alone make no picture.

    Every column with a value is drawn over `step`: those named loss* together, each other one in a panel of its own,
    flags as the share of steps so far in which they were set. None stands for no value.
    """
    if not rows:
        return
    _write_csv(Path(folder) / "trace.csv", rows)
    columns = [key for key in _columns(rows) if key != "step" and any(row.get(key) is not None for row in rows)]
    losses = [key for key in columns if key.startswith("loss")]
    panels = [losses] * bool(losses) + [[key] for key in columns if key not in losses]
    if not panels:
        return
    height = -(-len(panels) // 2)
    figure = Figure(figsize=(9, 3 * height), layout="constrained")
    grid = list(figure.subplots(height, 2, squeeze=False).flat)
    for axes, keys in zip(grid, panels, strict=False):
        tidy(axes, "losses" if keys is losses else TITLES.get(keys[0], keys[0]))
        for key in keys:
            _line(axes, rows, key, *LOSSES.get(key, (key, INK if len(keys) == 1 else None)))
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=9)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(panels) :]:
        axes.remove()
    write_png(Path(folder) / "trace.png", figure)


def write_saliency(folder: str | Path, changed: dict[str, int], sizes: dict[str, int]) -> None:
    """Write folder/saliency.csv (every parameter) and saliency.png (blocks of the network in order of use).

    `changed` has the number of entries really re-initialised and `sizes` the number of entries, by parameter name.
    A bar is the share of its block's entries that changed; a parameter missing from `changed` has 0.
    """
    rows = [
        {"parameter": name, "entries": size, "changed": changed.get(name, 0), "share": changed.get(name, 0) / size}
        for name, size in sizes.items()
    ]
    _write_csv(Path(folder) / "saliency.csv", rows)
    entries = dict.fromkeys(_in_order_of_use(_block(name) for name in sizes), 0)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        entries[_block(row["parameter"])] += row["entries"]
        counts[_kind(row["parameter"])][_block(row["parameter"])] += row["changed"]
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(entries)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, entries, {kind: counts[kind] for kind in KINDS if any(counts[kind].values())})
    total, whole = sum(changed.values()), sum(sizes.values())
    tidy(axes, f"{total:,} of {whole:,} entries re-initialised ({_percent(100 * total / whole)})")
    write_png(Path(folder) / "saliency.png", figure)


def _bars(axes: Axes, entries: dict[str, int], counts: dict[str, dict[str, int]]) -> None:
    """One bar per block, stacked by layer kind, with the number of changed entries written at its end."""
    left = dict.fromkeys(entries, 0.0)
    for kind, blocks in counts.items():
        widths = [100 * blocks[block] / entries[block] for block in entries]
        axes.barh(range(len(entries)), widths, left=list(left.values()), color=KINDS[kind][1], height=0.7, label=kind)
        left = {block: left[block] + width for block, width in zip(entries, widths, strict=True)}
    for row, (block, end) in enumerate(left.items()):
        number = sum(blocks[block] for blocks in counts.values())
        axes.annotate(
            f"{number:,}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.set_yticks(range(len(entries)), list(entries))
    axes.set_ylim(len(entries) - 0.3, -0.7)
    axes.set_xlim(0, 1.12 * max(left.values()) or 1)
    axes.set_xlabel("share of the block's entries; at the bar's end their number")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    if len(counts) > 1:
        axes.legend(frameon=False, fontsize=9)


def _block(parameter: str) -> str:
    """The part of the network a parameter belongs to: "down_blocks.1.attentions.0.norm.bias" -> "down_blocks.1"."""
    return re.match(r"[^.]+(\.\d+)?", parameter)[0]


def _in_order_of_use(blocks: Iterable[str]) -> list[str]:
    """diffusers registers a UNet's middle after its up blocks; data passes it before them."""
    return sorted(blocks, key=lambda block: block.startswith(("up_blocks", "conv_norm_out", "conv_out")))


def _kind(parameter: str) -> str:
    return next(kind for kind, (pattern, _) in KINDS.items() if re.search(pattern, parameter))


def _percent(value: float) -> str:
    return f"{value:.3g} %"


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _line(axes: Axes, rows: list[dict], key: str, label: str, colour: str | None) -> None:
    """A column over the steps; the share of True so far of a flag, in percent."""
    steps, values = zip(*((row["step"], row[key]) for row in rows if row.get(key) is not None), strict=True)
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
