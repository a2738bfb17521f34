"""The plots of the benchmark and of the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from classification.reporting.tables import TITLES, TableRow
from erase_sd.common.plotting import FORGET, INK, QUIET, RETAIN, tidy, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACIES = ("acc_t", "acc_r", "acc_f")
LABELS = {"acc_t": "Acc_t", "acc_r": "Acc_r", "acc_f": "Acc_f"}
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50)  # of an Avg. Gap, in %


def gaps(rows: Sequence[TableRow], again: str, file: Path) -> None:
    """Plot the Avg. Gap of every method, one panel per forget set, the best on top; grey up to the noise floor.

    `again` names the row of the second Retrain, whose gap is the noise floor.
    """
    from matplotlib.figure import Figure

    by_forget: dict[str, list[TableRow]] = {}
    for row in rows:
        by_forget.setdefault(row.group, []).append(row)
    figure = Figure(figsize=(5 * len(by_forget), 4.5), layout="constrained")
    panels = figure.subplots(1, len(by_forget), squeeze=False)[0]
    for axes, (forget, mine) in zip(panels, by_forget.items(), strict=True):
        methods = []
        for row in mine:
            if row.name == again:
                axes.axvspan(0, row.avg_gap, color=QUIET, alpha=0.4, linewidth=0)
            elif row.name != "retrain":
                methods.append(row)
        methods.sort(key=_avg_gap, reverse=True)
        _dots(axes, methods)
        tidy(axes, f"{forget}: Avg. Gap to Retrain, %")
    write_png(file, figure)


def variants(rows: Sequence[TableRow], file: Path) -> None:
    """Plot the Avg. Gap of variants of one method, in their order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    _dots(axes, rows[::-1])
    tidy(axes, "Avg. Gap to Retrain, %")
    write_png(file, figure)


def _avg_gap(row: TableRow) -> float:
    return row.avg_gap


def _dots(axes: Axes, rows: Sequence[TableRow]) -> None:
    """Plot a line per row, from below: a dot for the gap of the means, ticks for seeds, hollow for the paper's."""
    from matplotlib.ticker import NullLocator

    gaps: list[float] = []
    for y, row in enumerate(rows):
        colour = FORGET if row.name == "scissorhands" else RETAIN
        axes.plot(row.gaps, [y] * len(row.gaps), "|", color=colour, markersize=9, alpha=0.6)
        axes.plot(row.avg_gap, y, "o", color=colour, markersize=8)
        if "avg_gap" in row.paper:
            axes.plot(row.paper["avg_gap"], y, "o", color=colour, markersize=8, fillstyle="none")
        gaps += row.gaps
    axes.set_yticks(range(len(rows)), [TITLES.get(row.name, row.name) for row in rows])
    axes.set_xscale("symlog", linthresh=2)  # linear up to 2, so that one ruined model does not hide the others
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.15 * max(gaps, default=1))


def panels(curves: dict[str, dict[float, TableRow]], retrain: TableRow, logs: set[str], file: Path) -> None:
    """Plot accuracies over one option per panel, as in the paper's Fig. 2, with Acc_f beside; Retrain's are dashed.

    `curves` holds {name of the option: {value: row}}; `logs` names the panels with a logarithmic axis.
    """
    from matplotlib.figure import Figure

    colours = {"acc_t": INK, "acc_r": RETAIN, "acc_f": FORGET}
    figure = Figure(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for accuracy in ACCURACIES:
            means, stds = [], []
            for row in rows.values():
                means.append(row.mean[accuracy])
                stds.append(row.std[accuracy] or 0)
            style = {"color": colours[accuracy], "marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar(list(rows), means, stds, label=LABELS[accuracy], **style)
            axes.axhline(retrain.mean[accuracy], color=colours[accuracy], linestyle="--", linewidth=1)
        if name in logs:
            least = min(value for value in rows if value > 0)
            axes.set_xscale("symlog", linthresh=least)
            axes.set_xlim(-least / 3, 1.5 * max(rows))
        tidy(axes, name)
    axes.legend(frameon=False, fontsize=9)
    figure.supylabel("accuracy, % (dashed: Retrain)", fontsize=9)
    write_png(file, figure)
