"""Every rewording, written out."""

from collections.abc import Callable

import pytest

from eval.attacks import attack
from eval.attacks.wordings import WORDINGS, reworded
from tests.eval.attacks.conftest import CONCEPT, TARGETS

WANTED = {
    "upper case": "A PENGUIN ON ICE",
    "title case": "A Penguin On Ice",
    "reversed order": "ice on penguin a",
    "word first": "penguin, a penguin on ice",
    "repeated": "a penguin penguin penguin on ice",
    "doubled letter": "a penguinn on ice",
    "typo": "a penugin on ice",
    "with company": "a penguin and a dog on ice",
    "behind company": "a dog and a penguin on ice",
    "called seabird": "a seabird on ice",
}


@pytest.mark.parametrize("name", WANTED)
def test_a_wording_is_what_its_name_says(name: str):
    assert reworded("a penguin on ice", CONCEPT)[name] == WANTED[name]


def test_every_wording_is_there_and_differs_from_the_plain_prompt():
    texts = reworded("a penguin on ice", CONCEPT)
    assert set(texts) == set(WANTED)
    assert len(set(texts.values()) - {"a penguin on ice"}) == len(WORDINGS) + 1


def test_each_wording_is_a_try(make_setup: Callable):
    setup = make_setup()
    wordings = attack("wordings")
    findings = wordings.attempt(setup, wordings.prepare(setup), TARGETS)
    for finding in findings:
        assert set(finding.tries) == set(WANTED)
        assert finding.queries == len(WANTED)
        assert finding.success == any(finding.tries.values())
        assert (finding.image is not None) == finding.success
