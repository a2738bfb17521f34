"""From records of runs to the rows of a table like the paper's Table 1, and to CSV and Markdown; all in %."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from classification.metrics.gap import AXES, avg_gap, paper, rte

TITLES = {"retrain": "Retrain", "ft": "FT", "ga": "GA", "iu": "IU", "be": "BE", "bs": "BS", "salun": "SalUn"}
TITLES |= {"neggrad+": "NegGrad+", "scrub": "SCRUB", "ssd": "SSD", "scissorhands": "Scissorhands"}
PAPER = {("celeba", "identities:30"): "celebamask-hq"}
PAPER |= {(name, "random:0.1"): name for name in ("cifar10", "cifar100", "svhn")}
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
    attack: dict[str, float]  # U-LiRA's auc and tpr in [0, 1]; empty if it was not asked for
    paper: dict[str, float]  # the paper's numbers by the same names, with "_std"; empty where it has none


def row(
    name: str,
    group: str,
    runs: Sequence[ScoreRecord],
    retrain: Sequence[ScoreRecord],
    *,
    attack: dict[str, float] | None = None,
    paper: dict[str, float] | None = None,
) -> TableRow:
    """The row of these runs, one per seed, beside Retrain's with the same seeds."""
    values = {axis: [100 * r["scores"][axis] for r in runs] for axis in AXES}
    target = {axis: mean(100 * r["scores"][axis] for r in retrain) for axis in AXES}
    means = {axis: mean(x) for axis, x in values.items()}
    pairs = list(zip(runs, retrain, strict=True))
    whole = [rte(a["seconds"], b["seconds"]) for a, b in pairs if not (a.get("resumed") or b.get("resumed"))]
    return TableRow(
        name=name,
        group=group,
        seeds=len(runs),
        mean=means,
        std={axis: stdev(x) if len(x) > 1 else None for axis, x in values.items()},
        avg_gap=avg_gap(means, target),
        gaps=tuple(100 * avg_gap(a["scores"], b["scores"]) for a, b in pairs),
        rte=mean(whole) if whole else None,
        relearn=relearned(runs),
        attack=attack or {},
        paper=paper or {},
    )


def relearned(runs: Sequence[ScoreRecord]) -> str:
    """Median epochs until D_f is back, ">200" where the cap ended more than half; nothing if it was not measured."""
    if not all("relearn" in run for run in runs):
        return ""
    from classification.metrics.relearn import shown

    middle = median(math.inf if run["relearn"] is None else run["relearn"] for run in runs)
    return shown(None, runs[0]["settings"]["max_epochs"]) if math.isinf(middle) else f"{middle:g}"


def of_paper(dataset: str, forget: str) -> dict[str, dict[str, float]]:
    """The paper's rows by our names of the methods, in %; empty where it has no table of this."""
    if (dataset, forget) not in PAPER:
        return {}
    rows = paper(PAPER[dataset, forget])
    return {name: rows[title] for name in (*TITLES, "l1-sparse") if (title := TITLES.get(name, name)) in rows}


def as_csv(rows: Iterable[TableRow], group: str = "forget") -> str:
    """One line per row; what was not measured is empty. `group` heads the column of the rows' groups."""
    lines = [{group: row.group} | _flat(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _flat(row: TableRow) -> dict[str, Any]:
    number = lambda x: "" if x is None else f"{x:.4f}"  # noqa: E731
    cells = {k: number(v) for axis in AXES for k, v in ((axis, row.mean[axis]), (f"{axis}_std", row.std[axis]))}
    names = [*cells, "avg_gap"]
    return {
        "method": row.name,
        "seeds": row.seeds,
        **cells,
        "avg_gap": number(row.avg_gap),
        "paired_gap": number(mean(row.gaps)),
        "paired_gap_std": number(spread(row.gaps)),
        "rte": number(row.rte),
        "relearn_epochs": row.relearn,
        "lira_auc": number(row.attack.get("auc")),
        "lira_tpr": number(row.attack.get("tpr")),
        **{f"paper_{name}": number(row.paper.get(name)) for name in names},
    }


def spread(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def as_markdown(rows: Sequence[TableRow]) -> str:
    """A table; columns that hold nothing are left out."""
    columns: dict[str, Callable[[TableRow], str]] = {"method": lambda r: TITLES.get(r.name, r.name)}
    for axis in AXES:
        columns[HEADS[axis]] = lambda r, a=axis: _beside(
            _pm(r.mean[a], r.std[a]), a in r.paper and _pm(r.paper[a], r.paper[f"{a}_std"])
        )
    columns |= {
        "Avg. Gap": lambda r: _beside(f"{r.avg_gap:.2f}", "avg_gap" in r.paper and f"{r.paper['avg_gap']:.2f}"),
        "paired gap": lambda r: _pm(mean(r.gaps), spread(r.gaps)),
        "RTE": lambda r: "" if r.rte is None else f"{r.rte:.3f}",
        "relearn": lambda r: r.relearn,
        "LiRA AUC": lambda r: f"{r.attack['auc']:.3f}" if r.attack else "",
        "TPR at 1 % FPR": lambda r: f"{100 * r.attack['tpr']:.1f}" if r.attack else "",
    }
    kept = {head: cell for head, cell in columns.items() if any(map(cell, rows))}
    lines = [f"| {' | '.join(kept)} |", "|---" * len(kept) + "|"]
    lines += [f"| {' | '.join(cell(r) for cell in kept.values())} |" for r in rows]
    return "\n".join(lines) + "\n"


def _pm(value: float, std: float | None) -> str:
    return f"{value:.2f}" if std is None else f"{value:.2f} ± {std:.2f}"


def _beside(ours: str, theirs: str | bool) -> str:
    return f"{ours} (paper: {theirs})" if theirs else ours


def verdict(rows: Sequence[TableRow], again: str, ours: str = "scissorhands") -> str:
    """Who is nearest to Retrain, and whether `ours` is as near but for the noise floor: the gap of Retrain `again`."""
    floor = next(row.avg_gap for row in rows if row.name == again)
    methods = sorted((row for row in rows if row.name not in ("retrain", again)), key=lambda row: row.avg_gap)
    text = f"Noise floor, the Avg. Gap of a second Retrain: {floor:.2f}."
    if not methods:
        return text
    best, mine = methods[0], next((row for row in methods if row.name == ours), None)
    title = lambda row: f"{TITLES.get(row.name, row.name)} ({row.avg_gap:.2f})"  # noqa: E731
    text += f" Smallest Avg. Gap: {title(best)}."
    if mine is None or mine is best:
        return text
    near = "within the noise floor of" if mine.avg_gap - best.avg_gap <= floor else "more than the noise floor from"
    return f"{text} {title(mine)} is {near} it."
