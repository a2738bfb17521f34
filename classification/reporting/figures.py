"""The plots of the benchmark and of the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from classification.reporting.tables import TITLES, TableRow
from erase_sd.common.plotting import FORGET, INK, QUIET, RETAIN, tidy, write_png

AXES = {"acc_t": ("Acc_t", INK), "acc_r": ("Acc_r", RETAIN), "acc_f": ("Acc_f", FORGET)}


def gaps(rows: Sequence[TableRow], again: str, file: Path) -> None:
    """Avg. Gap of every method, one panel per forget set, the best on top; grey up to the noise floor."""
    forgets = list(dict.fromkeys(row.group for row in rows))
    figure = Figure(figsize=(5 * len(forgets), 4.5), layout="constrained")
    for axes, forget in zip(figure.subplots(1, len(forgets), squeeze=False)[0], forgets, strict=True):
        mine = [row for row in rows if row.group == forget]
        axes.axvspan(0, next(row.avg_gap for row in mine if row.name == again), color=QUIET, alpha=0.4, linewidth=0)
        methods = [row for row in mine if row.name not in ("retrain", again)]
        _dots(axes, sorted(methods, key=lambda row: -row.avg_gap))
        tidy(axes, f"{forget}: Avg. Gap to Retrain, %")
    write_png(file, figure)


def variants(rows: Sequence[TableRow], file: Path) -> None:
    """Avg. Gap of variants of one method, in their order."""
    figure = Figure(figsize=(6, 0.4 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    _dots(axes, rows[::-1])
    tidy(axes, "Avg. Gap to Retrain, %")
    write_png(file, figure)


def _dots(axes: Axes, rows: Sequence[TableRow]) -> None:
    """One line per row, from below: a dot for the gap of the means, ticks for single seeds, the paper's is hollow."""
    for y, row in enumerate(rows):
        colour = FORGET if row.name == "scissorhands" else RETAIN
        axes.plot(row.gaps, [y] * len(row.gaps), "|", color=colour, markersize=9, alpha=0.6)
        axes.plot(row.avg_gap, y, "o", color=colour, markersize=8)
        if "avg_gap" in row.paper:
            axes.plot(row.paper["avg_gap"], y, "o", color=colour, markersize=8, fillstyle="none")
    axes.set_yticks(range(len(rows)), [TITLES.get(row.name, row.name) for row in rows])
    axes.set_xscale("symlog", linthresh=2)  # linear up to 2, so that one ruined model does not hide the others
    axes.set_xticks([0, 0.5, 1, 2, 5, 10, 20, 50], ["0", "0.5", "1", "2", "5", "10", "20", "50"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.15 * max((max(row.gaps) for row in rows), default=1))


def panels(curves: dict[str, dict[float, TableRow]], retrain: TableRow, logs: set[str], file: Path) -> None:
    """Accuracies over one knob per panel, as in the paper's Fig. 2, with Forget's beside; Retrain's are dashed.

    `curves` holds {name of the knob: {value: row}}; `logs` names the panels with a logarithmic axis.
    """
    figure = Figure(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        for axis, (label, colour) in AXES.items():
            means, stds = ([getattr(row, key)[axis] or 0 for row in rows.values()] for key in ("mean", "std"))
            axes.errorbar(list(rows), means, stds, color=colour, marker="o", markersize=4, capsize=2, label=label)
            axes.axhline(retrain.mean[axis], color=colour, linestyle="--", linewidth=1)
        if name in logs:
            least = min(x for x in rows if x > 0)
            axes.set_xscale("symlog", linthresh=least)
            axes.set_xlim(-least / 3, 1.5 * max(rows))
        tidy(axes, name)
    axes.legend(frameon=False, fontsize=9)
    figure.supylabel("accuracy, % (dashed: Retrain)", fontsize=9)
    write_png(file, figure)
