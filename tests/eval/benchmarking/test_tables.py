"""The results of one method, concept by concept, with intervals by scipy."""

import re

import pytest
from scipy.stats import binomtest

from eval.benchmarking.rows import BenchmarkRow
from eval.benchmarking.suites import ORIGINAL
from eval.benchmarking.tables import before_after_table

PICTURES = {"UA": 72, "IRA": 336, "CRA": 816}


def finished(method: str, concept: str, seed: int, *rates: float) -> tuple[BenchmarkRow, dict]:
    row = BenchmarkRow(method, concept, seed, (72, 336), (), {}, f"{method}-{concept}-{seed}")
    judged = {name: {"value": rate, "n": n} for (name, n), rate in zip(PICTURES.items(), rates, strict=True)}
    return row, judged | {"seed": seed, "other_share": 0.25 * seed, "reinitialised": 1106, "seconds": 120.0, "n": 408}


ROWS = [
    finished(ORIGINAL, "frog", 0, 0.0, 1.0, 0.99),
    finished(ORIGINAL, "frog", 1, 0.25, 1.0, 0.97),
    finished(ORIGINAL, "frog", 2, 0.5, 0.5, 0.5),  # of a seed that the method has not finished
    finished("Ours", "frog", 0, 1.0, 0.75, 0.98),
    finished("Ours", "frog", 1, 0.875, 0.5, 0.96),
    finished("Ours", "neon style", 0, 1.0, 1.0, 1.0),  # without the original there is no before
    finished("Other", "frog", 0, 0.0, 0.0, 0.0),
]


def test_rates_before_and_after_are_means_over_the_seeds_that_both_have():
    head, _, frog, *rest = before_after_table(ROWS, "Ours").splitlines()
    cells = dict(zip(head.split(" | "), frog.split(" | "), strict=True))
    assert cells["drawn when asked (100 - UA)"].startswith("87.5 → 6.2 [")
    assert cells["others of its kind (IRA)"].startswith("100.0 → 62.5 [")
    assert cells["the other kinds (CRA)"].startswith("98.0 → 97.0 [")
    assert frog.startswith("| frog |")
    assert frog.endswith("| 1,106 | 2.0 |")
    assert "| 12.5 |" in frog
    assert not any("neon" in line or "Other" in line for line in rest)
    assert "seeds 0, 1; together 144 pictures of the concept and 672 of everything else per row" in rest[-1]


@pytest.mark.parametrize(("column", "lost", "n"), [(1, 9, 144), (3, 420, 672)])
def test_intervals_are_wilsons_over_all_pictures(column: int, lost: int, n: int):
    cell = before_after_table(ROWS, "Ours").splitlines()[2].split(" | ")[column]
    low, high = map(float, re.search(r"\[(.*), (.*)\]", cell).groups())
    expected = binomtest(lost, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.06)


def test_a_picture_that_answers_for_two_kinds_counts_once():
    rows = [finished(ORIGINAL, "frog", 0, 0.0, 1.0, 1.0), finished("Ours", "frog", 0, 1.0, 1.0, 0.75)]
    cell = before_after_table(rows, "Ours").splitlines()[2].split(" | ")[4]
    low, high = map(float, re.search(r"75.0 \[(.*), (.*)\]", cell).groups())
    expected = binomtest(306, 408).proportion_ci(method="wilson")  # of 816 answers
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.06)


def test_a_method_without_rows_is_named():
    assert before_after_table(ROWS, "Lost") == "Lost has finished no row.\n"
