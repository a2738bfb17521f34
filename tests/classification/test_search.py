"""The search's own decisions: what it draws, which draw wins, and what a lost model counts."""

import math

import pytest

from classification import search
from classification.plan import make
from erase_sd.common.errors import LostModel


def row(forget: str, lr: float, gap: float) -> dict:
    return {"forget": forget, "method": "ft", "gap": gap, "knobs": {"lr": lr}}


def test_the_smallest_gap_wins_on_each_forget_set():
    rows = [row("a", 0.1, 2.0), row("a", 0.2, 1.0), row("b", 0.1, 1.0), row("b", 0.2, math.inf)]
    best = search.chosen(rows)
    assert best["a", "ft"]["knobs"] == {"lr": 0.2}
    assert best["b", "ft"]["knobs"] == {"lr": 0.1}


def test_a_tie_goes_to_the_draw_that_does_better_elsewhere():
    rows = [row("a", 0.1, 1.0), row("a", 0.2, 1.0001), row("b", 0.1, 5.0), row("b", 0.2, 3.0)]
    assert search.chosen(rows)["a", "ft"]["knobs"] == {"lr": 0.2}


def test_nothing_done_is_in_the_table_and_in_no_preset():
    assert search.chosen([row("a", 0.1, 1.0) | {"method": "nothing"}]) == {}


def test_the_epochs_to_choose_among_are_those_asked_for():
    options = search.Search(epochs=(1, 2, 4))
    for method, space in search.SPACES.items():
        found = search.space_of(options, method)
        assert found.keys() == space.keys()
        assert found.get("epochs") in (None, (1, 2, 4))


def test_every_draw_is_a_plan():
    options = search.Search()
    for method in search.SPACES:
        for point in search.draws(search.space_of(options, method), method, 4):
            make(dataset="fashion", method=method, **point)


def test_a_draw_that_loses_the_model_is_the_worst(monkeypatch: pytest.MonkeyPatch):
    scores = {"acc_f": 0.9, "acc_r": 1.0, "acc_val": 0.9, "mia_val": 0.2}

    def unlearned(plan) -> dict:
        if plan.job.method == "ga":
            raise LostModel("after 3 steps fc.weight holds NaN: the model is lost")
        return {"scores": scores}

    monkeypatch.setattr(search, "unlearned", unlearned)
    monkeypatch.setattr(search, "run_all", lambda jobs, n, text, work: [work(make(**job)) for job in jobs])
    options = search.Search(forget=("random:0.1",), methods=("ga", "be"), budget=1, seeds=1)
    gaps = {found["method"]: found["gap"] for found in search.results(options)}
    assert gaps == {"nothing": 0.0, "ga": math.inf, "be": 0.0}
