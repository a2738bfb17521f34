"""Scores of methods, fronts and pooled distances, with numbers worked out by hand or by scipy."""

import csv
import io
import json
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
import torch
from safetensors.torch import save
from scipy.linalg import sqrtm
from scipy.stats import binomtest

from erase_sd.common.files import write_atomic
from eval.benchmarking import aggregate, plots
from eval.benchmarking.aggregate import Distances, MethodScore, common, front, harmonic, method_scores, pareto
from eval.benchmarking.rows import BenchmarkRow
from eval.benchmarking.suites import ORIGINAL, Suite
from eval.benchmarking.tables import few_pictures, leaderboard_csv, leaderboard_page, ranked, verdict
from eval.benchmarking.trial import features_file


def make_row(method: str, concept: str, seed: int) -> BenchmarkRow:
    return BenchmarkRow(method, concept, seed, (4, 40), (), {}, f"{method}-{concept}-{seed}")


def result(ua: float, ira: float, cra: float, **more) -> dict:
    rates = {name: {"value": value, "n": 40} for name, value in (("UA", ua), ("IRA", ira), ("CRA", cra))}
    usual = {
        "seed": 0,
        "concept": "frog",
        "n": 44,
        "other_share": 0.1,
        "drift": 0.002,
        "drift_rmse": 3.0,
        "seconds": 5.0,
        "peak_memory_mib": 600.0,
        "broken": 0,
    }
    return rates | usual | more


FINISHED = [
    (make_row(ORIGINAL, "frog", 0), result(0.0, 0.96, 0.98, seconds=0.0, peak_memory_mib=None)),
    (
        make_row(ORIGINAL, "neon style", 0),
        result(0.0, 0.98, 0.96, seconds=0.0, peak_memory_mib=None, concept="neon style"),
    ),
    (make_row("ESD", "frog", 0), result(0.8, 0.9, 1.0, seconds=4.0)),
    (make_row("ESD", "frog", 1), result(1.0, 0.8, 0.9, seconds=8.0, peak_memory_mib=700.0, seed=1)),
    (make_row("ESD", "neon style", 0), result(0.5, 0.95, 0.95, broken=3, concept="neon style")),
]


def of(board: list[MethodScore], method: str, concept: str | None) -> MethodScore:
    return next(s for s in board if (s.method, s.concept) == (method, concept))


def test_seeds_are_averaged_then_concepts(tmp_path: Path):
    board = method_scores(FINISHED, tmp_path)
    frog, neon, both = (of(board, "ESD", concept) for concept in ("frog", "neon style", None))
    assert [frog.values[key] for key in ("ua", "ira", "cra")] == pytest.approx([90, 85, 95])
    means = [harmonic([80, 90, 100]), harmonic([100, 80, 90])]
    assert frog.spread == pytest.approx({"ua": 200**0.5, "ira": 50**0.5, "cra": 50**0.5, "mean": stdev(means)})
    assert frog.runs == 2
    assert neon.spread == dict.fromkeys(("ua", "ira", "cra", "mean"))
    assert neon.values["broken"] == 3
    assert [both.values[key] for key in ("ua", "ira", "cra")] == pytest.approx([70, 90, 95])
    assert both.runs == 3
    assert both.spread == dict.fromkeys(("ua", "ira", "cra", "mean"))  # the seeds have finished other concepts
    assert frog.values["mean"] == pytest.approx(3 / (1 / 90 + 1 / 85 + 1 / 95))
    assert both.values["mean"] == pytest.approx(3 / (1 / 70 + 1 / 90 + 1 / 95))
    assert (frog.values["seconds"], frog.values["memory"]) == (6, 700)
    assert frog.values["drift"] == pytest.approx(2)
    assert frog.values["other"] == pytest.approx(10)
    assert {s.values["fid"] for s in board} == {None}  # no features, no distance


def test_trainings_are_compared_seed_by_seed_and_pictures_all_together(tmp_path: Path):
    rates = {0: (0.9, 0.8), 1: (0.7, 0.8), 2: (0.8, 0.2)}  # of two concepts: 0.85, 0.75 and 0.5 a seed
    finished = []
    for seed, pair in rates.items():
        for concept, ua in zip(("frog", "neon style"), pair, strict=True):
            finished.append((make_row("ESD", concept, seed), result(ua, 1.0, 1.0, seed=seed, concept=concept)))
    both = of(method_scores(finished, tmp_path), "ESD", None)
    assert both.spread["ua"] == pytest.approx(stdev([85, 75, 50]))
    assert both.spread["ira"] == 0
    expected = binomtest(168, 240).proportion_ci(method="wilson")  # 0.7 of 6 x 40
    assert both.interval["ua"] == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.02)
    assert both.interval["ira"][1] == 100


def test_a_method_that_lacks_a_concept_is_compared_on_the_others(tmp_path: Path):
    more = [(make_row("UCE", "frog", 0), result(1.0, 0.5, 0.5))]
    board = method_scores([*FINISHED, *more], tmp_path)
    assert common(board) == ["frog"]
    assert of(board, "ESD", None).values == of(board, "ESD", "frog").values
    assert of(board, "ESD", None).runs == 2
    page = leaderboard_page("toy", Suite(methods={}, concepts=("frog", "neon style")), board, [])
    assert "## Mean over frog, which every method has finished" in page
    assert "## neon style" in page
    nowhere = [(make_row("UCE", "pencil style", 0), result(1.0, 0.5, 0.5))]
    assert of(method_scores([*FINISHED, *nowhere], tmp_path), "UCE", None).values["ua"] == 100


def test_the_harmonic_mean_of_nothing_erased_is_nothing():
    assert harmonic([0.0, 99.0, 98.0]) == 0
    assert harmonic([60.0, 60.0, 60.0]) == pytest.approx(60)
    assert harmonic([100.0, 50.0, 50.0]) == pytest.approx(60)


def test_the_front():
    points = {
        "a": (100, 50),
        "b": (90, 90),
        "c": (90, 80),
        "d": (10, 95),
        "e": (5, 95),
        "f": (0, 0),
        "b again": (90, 90),
    }
    assert front(points) == {"a", "b", "b again", "d"}
    assert front({}) == set()
    assert front({"x": (0, 0)}) == {"x"}


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Features of three seeds of the original model and of one method in tmp_path, and of the reference."""
    draw = np.random.default_rng(0)
    found = {"reference": draw.normal(size=(120, 5)).astype(np.float32)}
    for method, shift in ((ORIGINAL, 0.0), ("ESD", 0.7)):
        found[method] = draw.normal(shift, 1 + shift, size=(120, 5)).astype(np.float32)
        for seed in range(3):
            part = torch.from_numpy(found[method][40 * seed : 40 * seed + 40]).contiguous()
            write_atomic(features_file(make_row(method, "frog", seed), tmp_path), save({"features": part}))
    parts = torch.from_numpy(found["reference"]).split(40)
    monkeypatch.setattr(aggregate, "reference", lambda concept, seed, n, folder: parts[seed])
    return found


def fid_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    a, b = np.cov(x, rowvar=False, dtype=np.float64), np.cov(y, rowvar=False, dtype=np.float64)
    apart = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    return float(apart @ apart + np.trace(a + b - 2 * sqrtm(a @ b).real))


def test_the_pooled_fid_is_that_of_all_features_together(tmp_path: Path, features: dict[str, np.ndarray]):
    finished = [(make_row(m, "frog", s), result(0.5, 0.5, 0.5)) for m in (ORIGINAL, "ESD") for s in range(3)]
    board = method_scores(finished, tmp_path)
    fids = {m: fid_by_scipy(features[m], features["reference"]) for m in (ORIGINAL, "ESD")}
    for method, fid in fids.items():
        values = of(board, method, "frog").values
        assert values["fid"] == pytest.approx(fid, rel=1e-6)
        assert values["n"] == 120
        assert values["fid_above"] == pytest.approx(fid - fids[ORIGINAL], rel=1e-6)
    alone = [(r, x) for r, x in finished if r.method == ORIGINAL or r.seed == 0]  # its floor is of one seed as well
    values = of(method_scores(alone, tmp_path), "ESD", "frog").values
    first = [fid_by_scipy(features[m][:40], features["reference"][:40]) for m in ("ESD", ORIGINAL)]
    assert values["fid_above"] == pytest.approx(first[0] - first[1], rel=1e-6)


def test_distances_outlive_their_features_and_go_with_their_rows(tmp_path: Path, features: dict[str, np.ndarray]):
    finished = [(make_row("ESD", "frog", s), result(0.5, 0.5, 0.5)) for s in range(3)]
    known = of(method_scores(finished, tmp_path), "ESD", "frog").values["fid"]
    for file in (tmp_path / ".cache" / "features").iterdir():
        file.unlink()
    assert of(method_scores(finished, tmp_path), "ESD", "frog").values["fid"] == known
    assert Distances(tmp_path, {}).of([row for row, _ in finished[:2]]) is None
    method_scores(finished[:2], tmp_path)  # the third is stale now
    assert json.loads((tmp_path / "distances.json").read_text()) == {}


def test_seeds_of_another_machine_leave_the_distances_of_the_others(tmp_path: Path, features: dict[str, np.ndarray]):
    finished = [(make_row(m, "frog", s), result(0.5, 0.5, 0.5)) for s in range(3) for m in (ORIGINAL, "ESD")]
    for count in (2, 4):  # after the first seed, and after the second
        known = of(method_scores(finished[:count], tmp_path), "ESD", "frog").values
    features_file(finished[1][0], tmp_path).unlink()
    board = method_scores(finished, tmp_path)
    here, floor = of(board, "ESD", "frog"), of(board, ORIGINAL, "frog")
    assert here.runs == 3
    assert here.values["n"] == 80
    assert floor.values["n"] == 120
    assert [here.values[key] for key in ("fid", "kid", "fid_above")] == [
        known[key] for key in ("fid", "kid", "fid_above")
    ]


def test_the_tables(tmp_path: Path):
    board = method_scores(FINISHED, tmp_path)
    suite = Suite(methods={}, concepts=("frog", "neon style"))
    page = leaderboard_page("toy", suite, board, [make_row("ESD", "neon style", 1), make_row("ESD", "frog", 2)])
    assert "| method | UA | IRA | CRA | HM | nothing | drift | seconds | MiB | broken | runs | front |" in page
    assert "| ESD | 70.0 | 90.0 | 95.0 | 83.5 | 10.0 | 2.0 | 5.5 | 650 | 1.5 | 3 | yes |" in page
    assert "| ESD | 90.0 ± 14.1 | 85.0 ± 7.1 | 95.0 ± 7.1 |" in page
    assert "- ESD: neon style 1, frog 2\n" in page
    assert "Best harmonic mean: ESD (83.5); IRA -7.0 and CRA -2.0 points from the original model." in page
    assert page.index("| original |") < page.index("| ESD |")
    assert "_std" not in page
    lines = list(csv.DictReader(io.StringIO(leaderboard_csv(board))))
    assert [(line["method"], line["concept"]) for line in lines][-2:] == [(ORIGINAL, "all"), ("ESD", "all")]
    assert lines[2]["ua"] == "90"
    assert lines[2]["ua_std"] == "14.1421"
    assert lines[2]["fid"] == "" == lines[0]["memory"]
    assert lines[2]["ua_low"] == "81.49"  # Wilson of 72 of 80
    plots.leaderboard(board, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_best_harmonic_mean_leads_and_the_front_needs_no_original():
    def one(method: str, ua: float, kept: float) -> MethodScore:
        values = {"ua": ua, "ira": kept, "cra": kept, "mean": harmonic([ua, kept, kept])}
        return MethodScore(method, None, 1, values, {}, {})

    board = [one("weak", 50, 96), one(ORIGINAL, 0, 97), one("lost", 100, 1), one("good", 99, 95), one("worse", 98, 95)]
    assert [s.method for s in ranked(board, None)] == [ORIGINAL, "good", "worse", "weak", "lost"]
    assert pareto(board) == {"weak", "good", "lost"}


def test_the_verdict_names_what_the_seeds_do_not_tell_apart():
    def one(method: str, mean: float, spread: float) -> MethodScore:
        values = {"ua": mean, "ira": mean, "cra": mean, "mean": mean}
        return MethodScore(method, None, 3, values, {"mean": spread}, {})

    board = [one("a", 98.2, 0.1), one("b", 98.0, 0.3), one("c", 95.2, 1.0)]
    assert verdict(board) == "Best harmonic mean: a (98.2 ± 0.1), which these seeds do not tell apart from b."


def test_every_picture_of_the_grid_says_whether_it_is_to_be_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plots, "captions_shown", lambda row: [(True, "a frog"), (False, "an octopus")])
    headings = plots._titles(make_row("ESD", "frog", 0))
    assert headings == ["FORGET frog: a frog", "KEEP, frog erased: an octopus"]


@pytest.mark.parametrize(("n", "said"), [(240, True), (256, True), (257, False), (None, False)])
def test_distances_of_few_pictures_are_said_to_be_rough(n: int | None, said: bool):
    """The oracle's pooled features have 2 x 128 dimensions."""
    text = few_pictures([MethodScore("a", None, 1, {"n": n}, {}, {})])
    assert ("fewer than the 256 dimensions" in text) == said
