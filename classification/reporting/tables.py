"""From records of runs to the rows of a table like the paper's Table 1, and to CSV and Markdown; all in %."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from classification.metrics.gap import AXES, avg_gap, paper, rte, tow
from classification.metrics.relearn import shown

TITLES = {"retrain": "Retrain", "ft": "FT", "ga": "GA", "iu": "IU", "be": "BE", "bs": "BS", "salun": "SalUn"}
TITLES |= {
    "nothing": "nothing done",
    "badt": "BadT",
    "lotus": "LoTUS",
    "neggrad+": "NegGrad+",
    "scrub": "SCRUB",
    "ssd": "SSD",
    "scissorhands": "Scissorhands",
}
PAPER = {("celeba", "identities:30"): "celebamask-hq"}
PAPER |= {("cifar10", "random:0.1"): "cifar10", ("cifar100", "random:0.1"): "cifar100", ("svhn", "random:0.1"): "svhn"}
HEADS = {"acc_f": "Acc_f", "acc_t": "Acc_t", "acc_r": "Acc_r", "mia": "MIA", "avg_gap": "Avg. Gap"}
ScoreRecord = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One method on one forget set (or one per seed); means and sample standard deviations over the seeds, in %."""

    name: str
    group: str  # forget set or table that it stands in
    seeds: int
    mean: dict[str, float]  # by AXES
    std: dict[str, float | None]  # None for a single seed
    avg_gap: float  # to Retrain, of the means, as the paper's
    gaps: tuple[float, ...]  # to the same seed's Retrain
    rte: float | None  # wall time as a share of Retrain's; None where all runs were interrupted
    relearn: str  # median epochs
    acted: str  # in how many of its steps the forget set was part of the update, "6 of 90"; empty if nobody counted
    projected: str  # in how many a projection bit; empty where there is none
    tow: float  # tug of war of the means, in [0, 1]
    js: float | None  # mean Jensen-Shannon divergence of D_f's answers from the same seed's Retrain, in nats
    attack: dict[str, float]  # U-LiRA's auc and tpr in [0, 1]; empty if it was not asked for
    paper: dict[str, float]  # the paper's numbers by the same names, with "_std"; empty where it has none


def row(
    name: str,
    group: str,
    runs: Sequence[ScoreRecord],
    retrain: Sequence[ScoreRecord],
    *,
    js: float | None = None,
    attack: dict[str, float] | None = None,
    paper: dict[str, float] | None = None,
) -> TableRow:
    """Return the row of these runs, one per seed, beside Retrain's with the same seeds."""
    means, stds, target = {}, {}, {}
    for axis in AXES:
        values = [100 * run["scores"][axis] for run in runs]
        means[axis] = mean(values)
        stds[axis] = spread(values)
        target[axis] = mean([100 * run["scores"][axis] for run in retrain])
    gaps, times = [], []
    for run, its_retrain in zip(runs, retrain, strict=True):
        gaps.append(100 * avg_gap(run["scores"], its_retrain["scores"]))
        if not run.get("resumed") and not its_retrain.get("resumed"):  # their seconds are the whole time
            times.append(rte(run["seconds"], its_retrain["seconds"]))
    return TableRow(
        name=name,
        group=group,
        seeds=len(runs),
        mean=means,
        std=stds,
        avg_gap=avg_gap(means, target),
        gaps=tuple(gaps),
        rte=mean(times) if times else None,
        relearn=relearned(runs),
        acted=counted(runs, "forget"),
        projected=counted(runs, "projected") if name == "scissorhands" else "",
        tow=tow(means, target, full=100),
        js=js,
        attack=attack or {},
        paper=paper or {},
    )


def relearned(runs: Sequence[ScoreRecord]) -> str:
    """Return the median of the epochs until D_f is back, ">200" where the cap ended more than half of the runs.

    Empty where a run's was not measured.
    """
    epochs = []
    for run in runs:
        if "relearn" not in run:
            return ""
        epochs.append(math.inf if run["relearn"] is None else run["relearn"])
    middle = median(epochs)
    if math.isinf(middle):
        return shown(None, runs[0]["settings"]["max_epochs"])
    return f"{middle:g}"


def counted(runs: Sequence[ScoreRecord], what: str) -> str:
    """Return the mean number of steps that did this, "6 of 90"; empty where a run's were not counted."""
    counts, steps = [], []
    for run in runs:
        if "acted" not in run:
            return ""
        counts.append(run["acted"][what])
        steps.append(run["acted"]["steps"])
    return f"{mean(counts):.0f} of {mean(steps):.0f}"


def of_paper(dataset: str, forget: str) -> dict[str, dict[str, float]]:
    """Return the paper's rows by our names of the methods, in %; empty where it has no table of this."""
    if (dataset, forget) not in PAPER:
        return {}
    rows = paper(PAPER[dataset, forget])
    found = {}
    for name in (*TITLES, "l1-sparse"):
        title = TITLES.get(name, name)
        if title in rows:
            found[name] = rows[title]
    return found


def as_csv(rows: Iterable[TableRow], group: str = "forget") -> str:
    """Return one line per row; what was not measured is empty. `group` heads the column of the rows' groups."""
    lines = [{group: row.group} | _flat(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: TableRow) -> dict[str, Any]:
    """Return the cells of a row by the names of their columns."""
    cells: dict[str, Any] = {"method": row.name, "seeds": row.seeds}
    for axis in AXES:
        cells[axis] = _number(row.mean[axis])
        cells[f"{axis}_std"] = _number(row.std[axis])
    cells["avg_gap"] = _number(row.avg_gap)
    cells["paired_gap"] = _number(mean(row.gaps))
    cells["paired_gap_std"] = _number(spread(row.gaps))
    cells["tow"] = _number(row.tow)
    cells["js"] = _number(row.js)
    cells["rte"] = _number(row.rte)
    cells["relearn_epochs"] = row.relearn
    cells["acted"] = row.acted
    cells["projected"] = row.projected
    cells["lira_auc"] = _number(row.attack.get("auc"))
    cells["lira_tpr"] = _number(row.attack.get("tpr"))
    for axis in AXES:
        cells[f"paper_{axis}"] = _number(row.paper.get(axis))
        cells[f"paper_{axis}_std"] = _number(row.paper.get(f"{axis}_std"))
    cells["paper_avg_gap"] = _number(row.paper.get("avg_gap"))
    cells["paper_distance"] = _number(distance(row))
    return cells


def distance(row: TableRow) -> float | None:
    """Return the mean absolute difference of the row's four means to the paper's, in %; None where it has none."""
    return avg_gap(row.mean, row.paper) if row.paper else None


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def as_markdown(rows: Sequence[TableRow]) -> str:
    """Return a table in Markdown; columns that hold nothing are left out."""
    cells = [_cells(row) for row in rows]
    heads = []
    for head in cells[0]:
        if any(line[head] for line in cells):
            heads.append(head)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in cells:
        lines.append(f"| {' | '.join(line[head] for head in heads)} |")
    return "\n".join(lines) + "\n"


def _cells(row: TableRow) -> dict[str, str]:
    """Return the cells of a row as text, by the heads of their columns."""
    cells = {"method": TITLES.get(row.name, row.name)}
    for axis in AXES:
        cells[HEADS[axis]] = _pm(row.mean[axis], row.std[axis])
        if axis in row.paper:
            cells[HEADS[axis]] += f" (paper: {_pm(row.paper[axis], row.paper[f'{axis}_std'])})"
    cells["Avg. Gap"] = f"{row.avg_gap:.2f}"
    if "avg_gap" in row.paper:
        cells["Avg. Gap"] += f" (paper: {row.paper['avg_gap']:.2f})"
    cells["paired gap"] = _pm(mean(row.gaps), spread(row.gaps))
    cells["ToW"] = f"{row.tow:.3f}"
    cells["JS"] = "" if row.js is None else f"{row.js:.3f}"
    cells["RTE"] = "" if row.rte is None else f"{row.rte:.3f}"
    cells["from the paper"] = f"{distance(row):.2f}" if row.paper else ""
    cells["relearn"] = row.relearn
    cells["acted in"] = row.acted
    cells["projected in"] = row.projected
    cells["LiRA AUC"] = f"{row.attack['auc']:.3f}" if row.attack else ""
    cells["TPR at 1 % FPR"] = f"{100 * row.attack['tpr']:.1f}" if row.attack else ""
    return cells


def _pm(value: float, std: float | None) -> str:
    return f"{value:.2f}" if std is None else f"{value:.2f} ± {std:.2f}"


def verdict(rows: Sequence[TableRow], again: str, ours: str = "scissorhands") -> str:
    """Return who is nearest to Retrain, and whether `ours` is as near but for the noise floor.

    The noise floor is the gap of the second Retrain, the row of the name `again`.
    """
    by_name = {row.name: row for row in rows}
    floor = by_name.pop(again).avg_gap
    by_name.pop("retrain", None)
    by_name.pop("nothing", None)
    text = f"Noise floor, the Avg. Gap of a second Retrain: {floor:.2f}."
    if not by_name:
        return text
    best = min(by_name.values(), key=lambda row: row.avg_gap)
    text += f" Smallest Avg. Gap: {_title(best)}."
    mine = by_name.get(ours)
    if mine is None or mine is best:
        return text
    near = "within the noise floor of" if mine.avg_gap - best.avg_gap <= floor else "more than the noise floor from"
    return f"{text} {_title(mine)} is {near} it."


def _title(row: TableRow) -> str:
    return f"{TITLES.get(row.name, row.name)} ({row.avg_gap:.2f})"
