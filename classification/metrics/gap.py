"""How near a row of a benchmark is to Retrain's, in one number; and the rows that the paper prints."""

import csv
from collections.abc import Mapping
from pathlib import Path

from erase_sd.common.errors import UserError

AXES = ("acc_f", "acc_t", "acc_r", "mia")
TABLES = Path(__file__).parents[1] / "reporting" / "paper_tables.csv"  # Tables 1 and 2 of arXiv 2401.06187, all in %

PaperRow = Mapping[str, float]
"""acc_f, acc_t, acc_r and mia of one method, all as shares or all in %."""


def avg_gap(row: PaperRow, retrain: PaperRow) -> float:
    """Return the mean absolute difference to Retrain over AXES, in the rows' unit."""
    total = 0.0
    for axis in AXES:
        total += abs(row[axis] - retrain[axis])
    return total / len(AXES)


def tow(row: PaperRow, retrain: PaperRow, *, full: float = 1.0) -> float:
    """Return the tug of war, in [0, 1], best at 1: the product of 1 - |difference to Retrain| over the accuracies.

    Zhao et al., arXiv 2406.01257. `full` is what a perfect accuracy is in the rows: 1, or 100 for rows in %. Raises
    ValueError where a difference exceeds it.
    """
    product = 1.0
    for axis in AXES[:3]:
        gap = abs(row[axis] - retrain[axis]) / full
        if gap > 1:
            raise ValueError(f"{axis} {row[axis]} and {retrain[axis]} are not shares of {full}: give full=100 for %")
        product *= 1 - gap
    return product


def rte(seconds: float, retrain_seconds: float) -> float:
    """Return the run-time efficiency: a method's whole wall time as a share of Retrain's, on one machine."""
    return seconds / retrain_seconds


def paper(dataset: str) -> dict[str, dict[str, float]]:
    """Return the paper's rows by method, Retrain's too: AXES, each with its `_std`, and `avg_gap` as printed, in %.

    SVHN's l1-sparse prints a gap of 4.65 where its row gives 4.58: its acc_t is a copy of SalUn's. Raises UserError
    for a data set the paper has no table of.
    """
    with TABLES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    known = sorted({row["dataset"] for row in rows})
    if dataset not in known:
        raise UserError(f"the paper has no table of {dataset}: choose among {', '.join(known)}")
    table = {}
    for row in rows:
        if row.pop("dataset") == dataset:
            method = row.pop("method")
            table[method] = {name: float(text) for name, text in row.items() if text}
    return table
