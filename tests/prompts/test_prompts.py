"""Concepts say what they mean, and retain captions never name what is forgotten."""

import hashlib
import re

import pytest

from prompts import Example, captions, load
from prompts.concepts import FOLDER
from prompts.templates import TEMPLATES, noun_phrase


def test_nudity_is_the_papers_four_words_and_one_anchor():
    concept = load("nudity")
    assert [example.prompt for example in concept.examples] == ["nude", "naked", "erotic", "sexual"]
    assert [example.caption for example in concept.examples] == ["nudity", "naked", "erotic", "sexual"]
    assert {example.anchor for example in concept.examples} == {"a photo of a person wearing clothes"}
    assert concept.kind == "attribute"
    assert load("Nudity") == concept


@pytest.mark.parametrize(
    ("text", "kind", "word", "example"),
    [
        ("cat", "object", "cat", "a photo of a cat"),
        ("a cat", "object", "cat", "a photo of a cat"),
        ("octopus", "object", "octopus", "a photo of an octopus"),
        ("grapes", "object", "grapes", "a photo of grapes"),
        ("Golden Gate Bridge", "object", "Golden Gate Bridge", "a photo of Golden Gate Bridge"),
        ("neon style", "style", "neon", "a house by a lake in neon style"),
        ("in the style of  Van Gogh", "style", "Van Gogh", "a tree on a hill in the style of Van Gogh"),
        ("red background", "background", "red", "a cup on a red background"),
        ("on an orange background", "background", "orange", "a cup on an orange background"),
    ],
)
def test_the_wording_tells_the_kind(text: str, kind: str, word: str, example: str):
    concept = load(text)
    assert (concept.kind, concept.words) == (kind, (word,))
    assert example in [e.prompt for e in concept.examples]
    assert all(e.prompt == e.caption for e in concept.examples)


def test_a_given_kind_wins_over_the_wording():
    assert load("neon", kind="style").words == load("neon style").words
    assert load("neon style", kind="object").words == ("neon style",)
    assert load("smiling", kind="attribute").examples[0] == Example(*("a person, smiling",) * 2, "a person")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_anchors_are_the_examples_without_the_concept(kind: str):
    examples = load("quokka", kind=kind).examples
    assert len({e.prompt for e in examples}) == len(examples) == 8
    for example in examples:
        assert "quokka" in example.prompt
        assert not re.search(r"quokka|style|background|[{},]", example.anchor)


def test_an_anchor_can_be_chosen():
    assert {e.anchor for e in load("grumpy cat", anchor="a photo of a cat").examples} == {"a photo of a cat"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "concept is empty"),
        (("  ",), "concept is empty"),
        (("a\nb",), r"'a\\nb' has unprintable"),
        (("x" * 201,), "201 characters: give at most 200"),
        (("cat", "animal"), "unknown kind 'animal': use one of auto, object"),
        (("nudity", "object"), "nudity is of kind attribute, not object"),
        (("cat", "auto", " "), "anchor is empty"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.mark.parametrize("text", ["../concepts/nudity", "concepts/nudity", "*", "{word}"])
def test_a_concept_is_text_never_a_path_or_a_pattern(text: str):
    assert text in load(text).examples[0].prompt


def test_a_broken_concept_file_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "concepts").mkdir()
    (tmp_path / "concepts" / "odd.json").write_text('{"kind": "object"}')
    monkeypatch.setattr("prompts.concepts.FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"odd\.json is not a concept file"):
        load("odd")


def test_retain_captions_are_distinct_printable_and_short():
    lines = captions()
    assert len(lines) >= 200
    assert len({line.lower() for line in lines}) == len(lines)
    assert all(line == line.strip() and line.isascii() and line.isprintable() for line in lines)
    assert max(map(len, lines)) < 100
    assert captions(without=load("nudity")) == lines


@pytest.mark.parametrize(("concept", "named"), [("cat", r"\bcats?\b"), ("cherry", r"\bcherr"), ("horses", r"\bhorse")])
def test_captions_that_name_the_concept_are_left_out(concept: str, named: str):
    gone = set(captions()) - set(captions(without=load(concept)))
    assert gone == {line for line in captions() if re.search(named, line)}
    assert gone


@pytest.mark.parametrize(("noun", "phrase"), [("unicorn", "a unicorn"), ("apple", "an apple"), ("glass", "a glass")])
def test_articles(noun: str, phrase: str):
    assert noun_phrase(noun) == phrase


def test_the_readme_lists_every_data_file_with_its_hash():
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (FOLDER / "README.md").read_text(), re.M))
    files = [*FOLDER.glob("*.txt"), *FOLDER.glob("concepts/*")]
    assert listed == {p.relative_to(FOLDER).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
