"""Several concepts, attributes and anchors: what a run is about, and what it refuses to be about."""

import json
import random

import pytest

import prompts
from erase_sd.common.errors import UserError
from erase_sd.denoising.concept import Target, resolve
from erase_sd.plan import make
from erase_sd.pocket.world import KINDS, Scene, grid
from erase_sd.settings import Job
from prompts import english


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


def test_each_sample_knows_its_own_concept() -> None:
    target = of("cat", "neon style")
    assert target.sources.concepts == ("a cat", "something in neon style")
    for i, example in enumerate(target.sources.forget):
        words = {"a cat": "cat", "something in neon style": "neon"}
        assert words[target.sources.owner(i)] in example.caption.split()
    assert set(target.sources.owners) == {0, 1}
    open_target = of("cat", "Van Gogh", model="x")
    assert open_target.sources.concepts == ("cat", "Van Gogh")
    for i, example in enumerate(open_target.sources.forget):
        assert open_target.sources.owner(i) in example.caption


@pytest.mark.parametrize("concepts", [("cat", "neon style"), ("neon style", "cat"), ("dog", "cat", "red background")])
def test_every_concept_is_shown_and_asked_for_alike(concepts: tuple[str, ...]) -> None:
    target = of(*concepts)
    words = [text.split()[0] for text in concepts]
    asked = [question.concept[1] for question in target.questions if question.concept]
    counts = [asked.count(word) for word in words]
    assert max(counts) - min(counts) <= 1
    for word in words:
        assert any(word in text.split() for text in target.shown[:6])


def test_one_concept_is_asked_for_as_before() -> None:
    """Published rows depend on it."""
    questions = [q for q in of("neon style").questions if q.concept]
    scenes = [scene for scene in shuffled() if scene.style == "neon"]
    assert [q.scene for q in questions] == scenes[:128]
    assert [q.seed for q in questions] == list(range(128))


def shuffled() -> list[Scene]:
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)
    return scenes


def test_a_concept_with_few_prompts_is_drawn_as_often() -> None:
    target = of("nudity", "cat", model="x")
    assert target.sources.owners.count(0) == target.sources.owners.count(1)
    assert [one.prompts for one in target.understood] == [40, 8]


def test_many_concepts_are_all_in_the_picture() -> None:
    names = ("cat", "dog", "fox", "owl", "crab", "goat")
    target = of(*names, model="x")
    for name in names:
        assert any(name in text.split() for text in target.shown[: len(names)])


@pytest.mark.parametrize("concept", ["nudity", "nude", "NSFW", "naked people", "a nude statue"])
def test_pictures_of_sensitive_concepts_alone_are_hidden(concept: str) -> None:
    target = of(concept, model="x")
    assert target.hidden[:4] == (True,) * 4
    assert not any(target.hidden[4:])
    assert len(target.hidden) == len(target.shown) == 8


def test_the_other_concept_is_not_hidden() -> None:
    target = of("nudity", "cat", model="x")
    hidden = dict(zip(target.shown, target.hidden, strict=True))
    assert [text for text in target.shown if hidden[text]] == list(target.shown[:4:2])
    assert not any(of("cat", model="x").hidden)


def test_people_who_are_to_stay_are_shown() -> None:
    kept = of("nudity", model="x").shown[4:]
    assert len(set(kept) & set(prompts.load("nudity").retain)) == 2


UNDERSTOOD = [
    ("cat", "x", ("object", None)),
    ("Van Gogh", "x", ("style", None)),
    ("Tom Cruise", "x", ("person", None)),
    ("nude", "x", ("attribute", "nudity.json")),
    ("cat", "pocket", ("object", None)),
    ("neon style", "pocket", ("style", None)),
]


@pytest.mark.parametrize(("concept", "model", "wanted"), UNDERSTOOD)
def test_how_a_concept_is_understood_is_said_and_recorded(concept: str, model: str, wanted: tuple) -> None:
    target = of(concept, model=model)
    (found,) = target.understood
    assert (found.kind, found.file) == wanted
    assert found.prompts == len({example.prompt for example in target.sources.forget}) >= 8
    assert any(english.mentions(found.prompt, word) for word in (*found.words, *prompts.load("nudity").words))
    assert found.anchor != found.prompt
    for part in (repr(concept), found.kind, str(found.prompts), repr(found.prompt), repr(found.anchor)):
        assert part in str(found)
    (record,) = of(concept, model=model).record()
    assert json.loads(json.dumps(record)) == record
    assert record["concept"] == concept


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
    ({"concept": ("nude", "nudity"), "model": "x"}, "--concept 'nude' 'nudity' names one concept twice"),
    ({"concept": ("Cat", "cat"), "model": "x"}, "--concept 'Cat' 'cat' names one concept twice"),
    ({"concept": "violence, nudity, harm", "model": "x"}, "give --concept violence nudity harm"),
    ({"concept": "cat, dog"}, "give --concept cat dog"),
    ({"concept": "no/such.json", "model": "x"}, "looks like a path, and there is no such file"),
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
