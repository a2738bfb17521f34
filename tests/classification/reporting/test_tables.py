"""Tables from records, with numbers worked out by hand."""

import csv
import io

import pytest

from classification.ablation import paper as paper_ablation
from classification.reporting import figures
from classification.reporting.tables import as_csv, as_markdown, of_paper, relearned, row, verdict


def record(acc_f: float, acc_t: float, acc_r: float, mia: float, seconds: float = 1.0, **more) -> dict:
    return {"scores": {"acc_f": acc_f, "acc_t": acc_t, "acc_r": acc_r, "mia": mia}, "seconds": seconds} | more


RETRAIN = [record(0.90, 0.95, 1.0, 0.10, 10.0), record(0.94, 0.93, 1.0, 0.14, 30.0)]
RUNS = [record(0.94, 0.95, 1.0, 0.06, 2.0), record(0.92, 0.91, 0.98, 0.16, 3.0)]


def test_means_and_sample_deviations_in_percent():
    found = row("ft", "random:0.1", RUNS, RETRAIN)
    assert found.mean == pytest.approx({"acc_f": 93, "acc_t": 93, "acc_r": 99, "mia": 11})
    assert found.std == pytest.approx({"acc_f": 2**0.5, "acc_t": 8**0.5, "acc_r": 2**0.5, "mia": 50**0.5})
    assert found.seeds == 2


def test_the_gap_is_that_of_the_means_and_the_paired_one_is_not():
    found = row("ft", "random:0.1", RUNS, RETRAIN)
    assert found.avg_gap == pytest.approx((1 + 1 + 1 + 1) / 4)  # 93-92, 93-94, 99-100, 11-12
    assert found.gaps == pytest.approx(((4 + 0 + 0 + 4) / 4, (2 + 2 + 2 + 2) / 4))
    itself = row("retrain", "random:0.1", RETRAIN, RETRAIN)
    assert itself.avg_gap == 0
    assert itself.gaps == (0, 0)
    assert itself.rte == 1


def test_rte_is_paired_and_leaves_interrupted_runs_out():
    assert row("ft", "", RUNS, RETRAIN).rte == pytest.approx((2 / 10 + 3 / 30) / 2)
    cut = [RUNS[0] | {"resumed": True}, RUNS[1]]
    assert row("ft", "", cut, RETRAIN).rte == pytest.approx(0.1)
    assert row("ft", "", RUNS, [r | {"resumed": True} for r in RETRAIN]).rte is None


def test_tow_is_a_product_over_the_accuracies():
    assert row("ft", "", RUNS, RETRAIN).tow == pytest.approx(0.99**3)  # 93-92, 93-94, 99-100


def test_steps_that_acted_are_means_over_the_seeds():
    first = RUNS[0] | {"acted": {"steps": 90, "forget": 6, "projected": 2}}
    second = RUNS[1] | {"acted": {"steps": 90, "forget": 0, "projected": 0}}
    found = row("scissorhands", "", [first, second], RETRAIN)
    assert (found.acted, found.projected) == ("3 of 90", "1 of 90")
    assert "| 3 of 90 | 1 of 90 |" in as_markdown([found])
    assert row("ft", "", [first, second], RETRAIN).projected == ""  # it has none
    assert row("ft", "", [first, RUNS[1]], RETRAIN).acted == ""  # an older run did not count


def test_the_distance_to_the_paper_is_over_the_four_numbers():
    theirs = of_paper("cifar10", "random:0.1")["scissorhands"]  # 95.40, 92.92, 98.93, 9.56
    found = row("scissorhands", "random:0.1", RUNS, RETRAIN, paper=theirs)  # 93, 93, 99, 11
    assert "| 1.00 |" in as_markdown([found])
    (line,) = csv.DictReader(io.StringIO(as_csv([found])))
    assert float(line["paper_distance"]) == pytest.approx((2.40 + 0.08 + 0.07 + 1.44) / 4)
    (line,) = csv.DictReader(io.StringIO(as_csv([row("ft", "", RUNS, RETRAIN)])))
    assert line["paper_distance"] == ""


def test_one_seed_has_no_deviation():
    found = row("ft", "random:0.1", RUNS[:1], RETRAIN[:1])
    assert set(found.std.values()) == {None}
    assert "| FT | 94.00 | 95.00 | 100.00 | 6.00 | 2.00 | 2.00 | 0.960 | 0.200 |" in as_markdown([found])
    (line,) = csv.DictReader(io.StringIO(as_csv([found])))
    assert line["acc_f"] == "94.0000"
    for column in ("acc_f_std", "relearn_epochs", "lira_auc"):
        assert line[column] == ""


def test_runs_without_their_retrain_are_refused():
    with pytest.raises(ValueError):
        row("ft", "random:0.1", RUNS, RETRAIN[:1])


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ([3, 9, 4], "4"),
        ([3, 4], "3.5"),
        ([3, None, 4], "4"),
        ([3, None, None], ">200"),
        ([3, None], ">200"),
        ([0], "0"),
    ],
)
def test_relearn_epochs_are_a_median_that_knows_of_the_cap(epochs: list[int | None], text: str):
    assert relearned([{"relearn": e, "settings": {"max_epochs": 200}} for e in epochs]) == text


def test_relearn_that_was_not_measured_is_empty():
    assert relearned(RUNS) == ""


def test_the_papers_numbers_stand_beside_ours():
    theirs = of_paper("cifar10", "random:0.1")
    assert theirs["scissorhands"]["avg_gap"] == 1.62
    assert theirs["l1-sparse"]["acc_t"] == 90.64
    assert theirs["retrain"]["mia"] == 13.05
    assert "avg_gap" not in theirs["retrain"]
    assert set(theirs) == {"retrain", "ft", "ga", "iu", "be", "bs", "l1-sparse", "salun", "scissorhands"}
    found = row("scissorhands", "random:0.1", RUNS, RETRAIN, paper=theirs["scissorhands"])
    text = as_markdown([found])
    assert "| Scissorhands | 93.00 ± 1.41 (paper: 95.40 ± 1.48) |" in text
    assert "1.00 (paper: 1.62)" in text
    (line,) = csv.DictReader(io.StringIO(as_csv([found])))
    assert (line["paper_mia"], line["paper_mia_std"], line["paper_avg_gap"]) == ("9.5600", "2.1300", "1.6200")


@pytest.mark.parametrize(
    ("dataset", "forget"), [("digits", "random:0.1"), ("cifar10", "class:3"), ("celeba", "class:3")]
)
def test_the_paper_has_no_numbers_of_anything_else(dataset: str, forget: str):
    assert of_paper(dataset, forget) == {}
    assert of_paper("celeba", "identities:30")["scissorhands"]["avg_gap"] == 2.82


def test_table_3_is_the_papers_and_its_gaps_follow_from_its_rows():
    retrain = of_paper("cifar10", "random:0.1")["retrain"]
    rows = paper_ablation()
    assert set(rows) == {"uniform, on", "uniform, off", "normal, on", "zeros, on", "ones, off"}
    for numbers in rows.values():
        gap = sum(abs(numbers[axis] - retrain[axis]) for axis in ("acc_f", "acc_t", "acc_r", "mia")) / 4
        assert numbers["avg_gap"] == pytest.approx(gap, abs=0.006)


def table(scissorhands: float):
    """Retrain, a second one 1 % off in each number, FT 2 % off and Scissorhands as said."""
    rows = []
    for name, gap in (("retrain", 0.0), ("again", 0.01), ("ft", 0.02), ("scissorhands", scissorhands)):
        rows.append(row(name, "class:3", runs_off(gap), runs_off(0.0), attack={"auc": 0.5, "tpr": 0.01}))
    return rows


def runs_off(gap: float) -> list[dict]:
    """One run, each of whose scores is so far from Retrain's."""
    return [record(0.9 - gap, 0.9 - gap, 0.9 - gap, 0.1 + gap, relearn=5, settings={"max_epochs": 200})]


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        (0.015, "Smallest Avg. Gap: Scissorhands (1.50)."),
        (0.025, "Smallest Avg. Gap: FT (2.00). Scissorhands (2.50) is within the noise floor of it."),
        (0.035, "Smallest Avg. Gap: FT (2.00). Scissorhands (3.50) is more than the noise floor from it."),
    ],
)
def test_the_verdict_knows_the_noise_floor(gap: float, text: str):
    assert verdict(table(gap), "again") == f"Noise floor, the Avg. Gap of a second Retrain: 1.00. {text}"


def test_the_plot_has_a_panel_per_forget_set_and_a_line_per_method(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "write_png", lambda file, figure: drawn.append(figure))
    figures.gaps(table(0.015), "again", tmp_path / "gaps.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["FT", "Scissorhands"]  # the best on top
    assert axes.get_title(loc="left").startswith("class:3")


def test_panels_have_retrain_dashed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "write_png", lambda file, figure: drawn.append(figure))
    retrain, _, low, high = table(0.03)
    figures.panels(
        {"k": {0.9: low, 1.0: high}, "lambda": {0.0: low, 0.1: high}}, retrain, {"lambda"}, tmp_path / "x.png"
    )
    for axes in drawn[0].axes:
        dashed = {round(line.get_ydata()[0], 6) for line in axes.lines if line.get_linestyle() == "--"}
        assert dashed == {90.0}
        assert axes.get_title(loc="left") in ("k", "lambda")
    assert [axes.get_xscale() for axes in drawn[0].axes] == ["linear", "symlog"]
