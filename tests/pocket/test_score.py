"""The arithmetic of scores.json on answers made by hand."""

import json
from pathlib import Path

import pytest
from PIL import Image

from erase_sd.pocket import score
from erase_sd.pocket.prompt_sets import Question
from erase_sd.pocket.score import scores, wilson
from erase_sd.pocket.world import Scene


def answer(text: str) -> dict[str, str]:
    return dict(zip(("object", "style", "background"), text.split(), strict=True))


def question(text: str, seed: int = 0, concept: tuple | None = None) -> Question:
    return Question(Scene(*text.split()), seed, concept)


CAT, PENCIL = ("object", "cat"), ("style", "pencil")


@pytest.mark.parametrize(
    ("rate", "n", "interval"),
    [
        (0.5, 100, (0.4038, 0.5962)),
        (0.0, 10, (0.0, 0.2775)),
        (1.0, 10, (0.7225, 1.0)),
        (0.0, 200, (0.0, 0.0188)),
        (0.05, 200, (0.0274, 0.0896)),
        (0.9, 50, (0.7864, 0.9565)),
    ],
)
def test_wilson_against_known_values(rate: float, n: int, interval: tuple) -> None:
    assert wilson(rate, n) == pytest.approx(interval, abs=1e-4)


def test_wilson_holds_the_rate_and_shrinks() -> None:
    for k in range(21):
        low, high = wilson(k / 20, 20)
        assert 0 <= low <= k / 20 <= high <= 1
        assert wilson(k / 20, 2000)[1] - wilson(k / 20, 2000)[0] < high - low
    assert list(wilson(0.0, 0)) == [0.0, 1.0]


def test_one_concept() -> None:
    questions = [question("cat flat red", i, CAT) for i in range(4)] + [
        question("dog neon blue", 9 + i) for i in range(2)
    ]
    before = [answer("cat flat red")] * 3 + [answer("other flat red")] + [answer("dog neon blue")] * 2
    after = [
        answer("cat flat red"),
        answer("dog flat red"),
        answer("other pencil red"),
        answer("other other other"),
        answer("dog neon blue"),
        answer("frog neon green"),
    ]
    found = scores([CAT], questions, before, after)
    assert found["concept"] == {"before": 0.75, "after": 0.25, "other_share": 0.5}
    assert found["retain"] == {
        "object": {"before": 1.0, "after": 0.5},
        "style": {"before": 1.0, "after": 1.0},
        "background": {"before": 1.0, "after": 0.5},
    }
    assert found["spared"] == {
        "style": {"before": 1.0, "after": 0.5},
        "background": {"before": 1.0, "after": 0.75},
    }
    assert found["n"] == {"forget": 4, "retain": 2}
    assert found["ci95"]["concept"] == {"before": wilson(0.75, 4), "after": wilson(0.25, 4)}
    assert found["ci95"]["retain"]["object"]["after"] == wilson(0.5, 2)
    assert found["ci95"]["spared"].keys() == found["spared"].keys()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))


def test_several_concepts_are_each_asked_for_their_own() -> None:
    """Drawing the other erased concept is no success of this question's: it is another picture's matter."""
    questions = [
        question("cat pencil red", 0, CAT),
        question("dog pencil red", 1, PENCIL),
        question("frog flat red", 2),
    ]
    before = [answer("cat pencil red"), answer("dog pencil red"), answer("frog flat red")]
    after = [answer("other pencil red"), answer("cat flat red"), answer("frog flat red")]
    found = scores([CAT, PENCIL], questions, before, after)
    assert found["concept"] == {"before": 1.0, "after": 0.0, "other_share": 0.5}
    assert found["concepts"]["cat"] == {"before": 1.0, "after": 0.0, "other_share": 1.0, "n": 1}
    assert found["ci95"]["concepts"]["pencil style"] == {"before": wilson(1.0, 1), "after": wilson(0.0, 1)}
    assert set(found["spared"]) == {"background"}
    assert set(found["retain"]) == {"object", "style", "background"}
    assert found["protocol"]["concepts"] == [["object", "cat"], ["style", "pencil"]]


def test_a_failed_concept_is_not_hidden_by_another() -> None:
    questions = [question("cat pencil red", i, CAT) for i in range(9)] + [question("dog pencil red", 9, PENCIL)]
    before = [answer("cat pencil red")] * 9 + [answer("dog pencil red")]
    after = [answer("other pencil red")] * 9 + [answer("dog pencil red")]
    found = scores([CAT, PENCIL], questions, before, after)
    assert found["concept"]["after"] == 0.1
    assert {name: rate["after"] for name, rate in found["concepts"].items()} == {"cat": 0.0, "pencil style": 1.0}
    assert "concepts" not in scores([CAT], questions[:9], before[:9], after[:9])


def test_what_nobody_asked_about_has_no_rate() -> None:
    asked = [question("cat flat red", 0, CAT)], [answer("cat flat red")], [answer("dog flat red")]
    kept = [question("dog neon blue", 1)], [answer("dog neon blue")], [answer("dog neon blue")]
    found = scores([CAT], *asked)
    assert "retain" not in found
    assert "retain" not in found["ci95"]
    assert found["concept"]["before"] == 1
    found = scores([CAT], *kept)
    assert not {"concept", "spared"} & {*found, *found["ci95"]}
    assert found["retain"]["object"]["after"] == 1


def test_a_ruined_model_scores_nothing() -> None:
    questions = [question("cat flat red", 0, CAT), question("dog neon blue", 1)]
    found = scores(
        [CAT], questions, [answer("cat flat red"), answer("dog neon blue")], [answer("other other other")] * 2
    )
    assert found["concept"]["other_share"] == 1
    assert found["concept"]["after"] == 0
    assert all(rate["after"] == 0 for group in ("retain", "spared") for rate in found[group].values())


def test_answers_are_drawn_once_per_model_and_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def sample(pipe, prompts, seeds, **_):
        drawn.extend(prompts)
        return [Image.new("RGB", (32, 32), (120, 130, 140))] * len(prompts)

    monkeypatch.setattr(score, "sample", sample)
    questions = [question("cat flat red", i, CAT) for i in range(3)]
    first = score.answers(None, questions, "model", tmp_path, "x")
    assert len(drawn) == 3
    assert score.answers(None, questions, "model", tmp_path, "x") == first
    assert len(drawn) == 3
    score.answers(None, [*questions, question("dog flat red", 7)], "model", tmp_path, "x")
    assert drawn[3:] == ["a dog in flat style on a red background"]
    score.answers(None, questions, "another model", tmp_path, "x")
    assert len(drawn) == 7
    score.answers(None, questions, "model", None, "x")
    assert len(drawn) == 10
    assert len(list(tmp_path.iterdir())) == 2
