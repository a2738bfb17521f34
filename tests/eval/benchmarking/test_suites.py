"""Suites of the benchmark: which rows there are, in what order, and what makes a row another one."""

from pathlib import Path

import pytest

from erase_sd.common.errors import UserError
from erase_sd.methods import METHODS as REGISTRY
from erase_sd.plan import make
from erase_sd.pocket.prompt_sets import exam
from erase_sd.settings import Job
from eval.benchmarking import rows as benchmark_rows
from eval.benchmarking import suites
from eval.benchmarking.rows import row, rows, stored
from eval.benchmarking.suites import ABLATION, ORIGINAL, OURS, REFERENCE, SUITES, TUNING, Suite

SALUN = {"method": "salun", "preset": "pocket"}
TWO = Suite(
    methods={"SalUn": SALUN, "ascent": {"method": "ascent", "preset": "pocket"}}, concepts=("frog", "neon style")
)


@pytest.mark.parametrize("name", SUITES)
def test_every_row_of_a_suite_can_be_run_and_is_one_of_its_own(name: str):
    found = rows(SUITES[name], (), (), ())
    assert len({row.file for row in found}) == len({row.key for row in found}) == len(found) > 5


def test_every_registered_method_is_in_the_suite():
    assert {values["method"] for values in SUITES["pocket"].methods.values()} >= REGISTRY.keys()


def test_settings_are_chosen_on_other_concepts_than_they_are_reported_on():
    assert not set(SUITES["pocket"].concepts) & set(TUNING)
    assert set(SUITES["pocket-ablation"].concepts) == set(SUITES["pocket-tuning"].concepts) == set(TUNING)


def test_an_ablation_changes_what_it_names():
    base = SUITES["pocket-ablation"].methods["base"]
    usual = make(concept="cat", model="pocket", **base).config()
    for name, more in ABLATION.items():
        changed = make(concept="cat", model="pocket", **base | more).config()
        assert {key for key in changed if changed[key] != usual[key]} == set(more), name
    default = SUITES["pocket-ablation"].methods["our default"]
    assert make(concept="cat", **default, model="pocket") == make(concept="cat", **OURS, model="pocket")


def test_the_first_seed_of_everything_comes_first_and_the_original_model_leads_it():
    found = [(row.seed, row.method, row.concept) for row in rows(TWO, (), (), ())]
    assert found[:4] == [
        (0, ORIGINAL, "frog"),
        (0, ORIGINAL, "neon style"),
        (0, "SalUn", "frog"),
        (0, "SalUn", "neon style"),
    ]
    assert [seed for seed, *_ in found] == [0] * 6 + [1] * 6 + [2] * 6


def test_a_suite_can_be_narrowed_and_asked_for_other_concepts():
    found = rows(TWO, ("SalUn",), ("Neon", "a banana", "neon style"), (5, 5))
    assert [(row.method, row.concept, row.seed) for row in found] == [
        (method, concept, 5) for method in (ORIGINAL, "SalUn") for concept in ("neon style", "banana")
    ]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"methods": ("UCE 2",)}, "'UCE 2' is not in this suite: it has SalUn, ascent"),
        ({"concepts": ("unicorn",)}, "no concept 'unicorn'"),
        ({"seeds": (REFERENCE,)}, "too large"),
    ],
)
def test_what_is_not_there_is_refused(asked: dict, text: str):
    with pytest.raises(UserError, match=text):
        rows(TWO, *(asked.get(key, ()) for key in ("methods", "concepts", "seeds")))


def test_a_method_that_nobody_registered_is_named():
    with pytest.raises(UserError, match="unknown method 'magic'"):
        rows(Suite(methods={"Magic": {"method": "magic"}}, concepts=("frog",)), (), (), ())


def test_the_key_holds_knobs_pictures_and_protocol(monkeypatch: pytest.MonkeyPatch):
    def key(values: dict, **more) -> str:
        return row(Suite(methods={"m": SALUN | values}, concepts=("frog",), **more), "m", "frog", 0).key

    keys = [key({}), key({"lr": 1e-3}), key({"preset": "sd"}), key({}, retain_pictures=8), key({}, most_steps=3)]
    assert key({}) == keys[0]
    assert key({}, most_steps=10_000) == keys[0]
    protocol = benchmark_rows.protocol()
    monkeypatch.setattr(benchmark_rows, "protocol", lambda: protocol | {"model_sha256": "another"})
    assert len({*keys, key({})}) == 6
    assert (
        row(TWO, ORIGINAL, "frog", 0).key != row(TWO, ORIGINAL, "neon style", 0).key != row(TWO, ORIGINAL, "frog", 1)
    )


def test_pictures_are_the_same_for_all_methods_and_the_job_scores_nothing():
    plans = [make(**suites.DATA | values, concept="cat", model="pocket") for values in suites.METHODS.values()]
    assert (
        len({plan.sampling.__class__(**{**plan.sampling.__dict__, "anchor_pictures": False}) for plan in plans}) == 1
    )
    job = row(TWO, "SalUn", "frog", 0).job
    for option in ("--eval_forget", "--eval_retain"):
        assert job[job.index(option) + 1] == "0"
        assert getattr(Job(), option[2:]) > 0


@pytest.mark.parametrize("n", [6, 336])
def test_the_reference_asks_the_same_prompts_of_other_seeds(n: int):
    part = [("object", "frog")]
    for seed in range(3):
        asked, other = exam(part, 0, n, seed), exam(part, 0, n, seed + REFERENCE)
        assert [q.scene for q in asked] == [q.scene for q in other]
    every = [q.seed for seed in (0, 1, 2) for turn in (0, REFERENCE) for q in exam(part, 0, n, seed + turn)]
    assert len(set(every)) == 6 * n


def test_a_damaged_result_is_named_and_a_stale_one_is_none(tmp_path: Path):
    mine = row(TWO, "SalUn", "frog", 0)
    (tmp_path / "rows").mkdir()
    assert stored(mine, tmp_path, {}) is None
    (tmp_path / "rows" / mine.file).write_text('{"key": "another"}')
    assert stored(mine, tmp_path, {}) is None
    (tmp_path / "rows" / mine.file).write_text("{")
    with pytest.raises(UserError, match=f"{mine.file} is damaged"):
        stored(mine, tmp_path, {})
