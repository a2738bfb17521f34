"""Several concepts, attributes and anchors: what a run is about, and what it refuses to be about."""

import pytest

from erase_sd.common.errors import UserError
from erase_sd.denoising.concept import Target, resolve
from erase_sd.plan import make
from erase_sd.pocket.world import KINDS
from erase_sd.settings import Job


def of(*concepts: str, model: str = "pocket", **knobs: object) -> Target:
    return resolve(make(concept=concepts, model=model, **knobs).job)


def mentions(target: Target, word: str) -> set[tuple[bool, bool]]:
    """(in c_f, in its anchor) over all examples."""
    return {(word in e.caption.split(), word in e.anchor.split()) for e in target.sources.forget}


def test_an_anchor_of_the_pocket_model_is_another_word_of_the_kind() -> None:
    target = of("cat", anchor="dog")
    assert mentions(target, "cat") == {(True, False)}
    assert mentions(target, "dog") == {(False, True)}
    for example in target.sources.forget:
        assert example.anchor == example.caption.replace("a cat", "a dog")
    assert resolve(Job(concept=("cat",), model="pocket")).sources.retain == target.sources.retain


def test_an_anchor_changes_no_other_draw() -> None:
    plain, anchored = of("cat"), of("cat", anchor="a banana")
    assert [e.prompt for e in plain.sources.forget] == [e.prompt for e in anchored.sources.forget]


def test_one_anchor_per_concept() -> None:
    target = of("cat", "neon style", anchor=("dog", "flat style"))
    for e in target.sources.forget:
        expected = e.caption.replace("a cat", "a dog").replace("neon", "flat")
        assert e.anchor == expected != e.caption
    assert {("cat" in e.caption, "neon" in e.caption) for e in target.sources.forget} > {(True, False), (False, True)}
    assert not any("cat" in line or "neon" in line for line in target.sources.retain)
    alike = of("cat", "bear", anchor="dog")
    assert all("a dog" in e.anchor for e in alike.sources.forget)


def test_a_concept_without_a_wish_gets_a_word_that_stays() -> None:
    target = of("cat", "dog", "bear")
    assert all(not any(f"a {word}" in e.anchor for word in ("cat", "dog", "bear")) for e in target.sources.forget)
    assert all(any(word in e.anchor for word in KINDS["object"]) for e in target.sources.forget if "a" in e.caption)


def test_open_vocabulary_concepts_take_turns() -> None:
    """Four images of two concepts show both."""
    target = of("cat", "neon style", model="x", anchor=("a dog", "a house"))
    assert ["cat" in e.prompt for e in target.sources.forget[:4]] == [True, False, True, False]
    assert {e.anchor for e in target.sources.forget} == {"a dog", "a house"}
    one = of("cat", "fox", model="x", anchor="a dog")
    assert {e.anchor for e in one.sources.forget} == {"a dog"}
    assert len(target.sources.forget) == 16
    assert not any("cat" in line.split() for line in target.sources.retain)


def test_an_attribute_leaves_the_person() -> None:
    target = of("smiling", model="x", kind="attribute")
    assert all("smiling" in e.prompt and "smiling" not in e.anchor for e in target.sources.forget)
    assert {e.prompt.removesuffix(", smiling") for e in target.sources.forget} == {
        e.anchor for e in target.sources.forget
    }
    assert target.sources.retain
    assert not any("smiling" in line for line in target.sources.retain)


WRONG = [
    ({"concept": "cat", "anchor": "dragon"}, "the pocket model has no object 'dragon'; it draws"),
    ({"concept": "cat", "anchor": "neon style"}, "has no object 'neon style'"),
    ({"concept": "cat", "anchor": "a cat"}, "--anchor 'a cat' is to be erased: give another object instead of 'cat'"),
    ({"concept": ("cat", "dog"), "anchor": ("dog", "bear")}, "--anchor 'dog' is to be erased"),
    ({"concept": ("cat", "neon style"), "anchor": "dog"}, "has no style 'dog'"),
    (
        {"concept": ("cat", "dog"), "anchor": ("bear", "fish", "bird")},
        "3 anchors for 2 concepts; give one, or one per",
    ),
    ({"concept": ("cat", "cat")}, "--concept names 'cat' twice"),
    ({"concept": ("cat", "a cat")}, "--concept 'cat' 'a cat' names one concept twice"),
    ({"concept": "smiling", "kind": "attribute"}, "the pocket model has no attribute 'smiling'"),
    ({"concept": "cat", "anchor": "two cats", "model": "x"}, "--anchor 'two cats' names 'cat', which is to be erased"),
    ({"concept": ("cat", "dog"), "anchor": "a dog", "model": "x"}, "--anchor 'a dog' names 'dog'"),
    ({"concept": "cat", "anchor": " ", "model": "x"}, "the anchor is empty"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[m for _, m in WRONG])
def test_what_cannot_be_meant_is_one_sentence(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(make(**{"model": "pocket"} | given).job)
