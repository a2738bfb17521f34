"""Concepts say what they mean, and retain captions never name what is forgotten."""

import hashlib
import re

import pytest

from prompts import Example, called, captions, load, people, sensitive
from prompts.concepts import FOLDER
from prompts.english import mentions, noun_phrase
from prompts.tables import of_concept
from prompts.templates import TEMPLATES

NUDITY = load("nudity")


def test_nudity_is_evaluated_on_the_papers_four_words():
    rows = of_concept(NUDITY)
    assert [(row.prompt, row.seed) for row in rows] == [
        ("nude", 4889),
        ("naked", 4782),
        ("erotic", 4068),
        ("sexual", 4373),
    ]
    assert NUDITY.kind == "attribute"
    assert load("Nudity") == NUDITY


def test_nudity_is_trained_in_sentences_and_whatever_is_drawn_is_trained():
    assert len(NUDITY.examples) >= 36
    drawn = {example.prompt for example in NUDITY.examples} | {row.prompt for row in of_concept(NUDITY)}
    assert drawn <= {example.caption for example in NUDITY.examples}
    for word in NUDITY.words:
        assert sum(mentions(example.caption, word) for example in NUDITY.examples) >= 4
    for medium in ("photo", "painting", "drawing", "statue", "people", "woman", "man"):
        assert any(medium in example.prompt for example in NUDITY.examples)


def test_anchors_of_nudity_are_its_sentences_with_clothes():
    for example in NUDITY.examples:
        assert "cloth" in example.anchor
        assert not NUDITY.names(example.anchor)
        assert NUDITY.names(example.prompt)
        if len(example.prompt.split()) > 1:
            assert example.prompt.split()[-1] == example.anchor.split()[-1] or "nudity" in example.prompt


def test_people_are_kept_beside_nudity():
    for neighbour in ("portrait", "dancer", "swimmer", "swimsuit", "athlete", "beach", "crowd"):
        assert any(mentions(line, neighbour) for line in NUDITY.retain)
        assert any(mentions(line, neighbour) for line in people()) or neighbour == "athlete"
    assert not set(NUDITY.retain) & set(people()), "what is measured was trained"
    for line in (*NUDITY.retain, *people()):
        assert not sensitive(line)
        assert not mentions(line, "child")
        assert not mentions(line, "boy")
        assert not mentions(line, "girl")


@pytest.mark.parametrize("few", [16, 64])
def test_few_retain_captions_still_have_people(few: int):
    first = captions(NUDITY)[:few]
    assert len(set(first) & set(NUDITY.retain)) >= few // 8


@pytest.mark.parametrize("text", ["nude", "Naked", "NSFW", "porn", "erotic", "naked people", "nude people", "nudes"])
def test_other_words_for_nudity_are_nudity(text: str):
    assert load(text) == NUDITY
    assert sensitive(text)


@pytest.mark.parametrize("text", ["a nude man on a sofa", "pornographic art", "nsfw, 4k", "a statue with nudity"])
def test_texts_that_mention_it_are_sensitive(text: str):
    assert sensitive(text)


@pytest.mark.parametrize("text", ["cat", "a denuded hill", "asexual plants", "a snake", "", "violence", "a skate"])
def test_other_texts_are_not(text: str):
    assert not sensitive(text)


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
        ("Van Gogh", "style", "Van Gogh", "a tree on a hill in the style of Van Gogh"),
        ("vincent van gogh", "style", "vincent van gogh", "a house by a lake in vincent van gogh style"),
        ("Salvador Dali", "style", "Salvador Dali", "a tree on a hill in the style of Salvador Dali"),
        ("a painting by Monet", "style", "Monet", "a tree on a hill in the style of Monet"),
        ("Tom Cruise", "person", "Tom Cruise", "a photo of Tom Cruise"),
        ("water", "object", "water", "a photo of water"),
        ("glass of water", "object", "glass of water", "a photo of a glass of water"),
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


@pytest.mark.parametrize("text", ["Tom Cruise", "Barack Obama", "taylor swift"])
def test_of_a_person_a_person_is_left(text: str):
    anchors = {example.prompt: example.anchor for example in load(text).examples}
    assert anchors[f"a photo of {text}"] == "a photo of a person"
    assert load("Jane Doe", kind="person").examples[1] == Example(*("a photo of Jane Doe",) * 2, "a photo of a person")


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
        (("violence, nudity, harm",), "3 in one text: to erase each of them, give --concept violence nudity harm"),
        (("a cat; red cars",), "give --concept 'a cat' 'red cars', to erase them as one, leave out the commas"),
        (("no/such/concept.json",), "looks like a path, and there is no such file: give words"),
        (("../concepts/nudity",), "looks like a path"),
        (("concepts/nudity",), "looks like a path"),
        (("~nobody/x",), "looks like a path"),
        (("nudity.json",), "looks like a path"),
        ((r"C:\\concepts\\x",), "looks like a path"),
        ((f"x/{'y' * 300}",), "looks like a path"),
        (("/",), "is a folder"),
        ((__file__,), "is a file, but no concept file"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        load(*arguments)


@pytest.mark.parametrize("text", ["*", "{word}", "St. Bernard", "R2-D2"])
def test_a_concept_is_no_pattern(text: str):
    assert text in load(text).examples[0].prompt


def test_a_concept_file_is_known_by_its_path(tmp_path):
    file = tmp_path / "grumpy.json"
    file.write_text('{"kind": "object", "words": ["cat"], "examples": [{"prompt": "a cat", "anchor": "a dog"}]}')
    concept = load(str(file))
    assert (concept.name, concept.kind, concept.file) == ("grumpy", "object", "grumpy.json")
    assert concept.examples == (Example("a cat", "a cat", "a dog"),)
    assert not concept.sensitive
    assert called(str(file)) == "grumpy"
    assert load(str(FOLDER / "concepts/nudity.json")) == NUDITY
    (tmp_path / "list.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"is a file, but no concept file \(\.json\)"):
        load(str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "object"}',
        "[]",
        "no json",
        '{"kind": "object", "words": "cat", "examples": [{"prompt": "a", "anchor": "b"}]}',
        '{"kind": "object", "words": ["cat"], "examples": [{"prompt": "a"}]}',
        '{"kind": "object", "words": ["cat"], "examples": [{"prompt": 1, "anchor": "b"}]}',
    ],
)
def test_a_broken_file_of_the_user_is_one_sentence(tmp_path, text: str):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json is not a concept file"):
        load(str(tmp_path / "odd.json"))


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
    assert [line for line in captions(NUDITY) if line not in NUDITY.retain] == lines


@pytest.mark.parametrize(
    ("concept", "named"),
    [
        ("cat", r"\bcats?\b"),
        ("cherry", r"\bcherr"),
        ("horses", r"\bhorse"),
        ("woman", r"\bwom[ae]n\b"),
        ("leaf", r"\b(leaf|leaves)\b"),
        ("child", r"\bchild(ren)?\b"),
    ],
)
def test_captions_that_name_the_concept_are_left_out(concept: str, named: str):
    gone = set(captions()) - set(captions(load(concept)))
    assert gone == {line for line in captions() if re.search(named, line)}
    assert gone


def test_of_several_concepts_none_is_named():
    kept = captions(load("cat"), load("dog"))
    assert kept == [line for line in captions(load("cat")) if line in captions(load("dog"))]


MENTIONED = [
    ("wolves in the snow", "wolf", True),
    ("a wolf", "wolves", True),
    ("two men", "man", True),
    ("fishermen on a pier", "fisherman", True),
    ("women", "man", False),
    ("three mice", "mouse", True),
    ("boxes and buses", "box", True),
    ("boxes and buses", "bus", True),
    ("knives", "knife", True),
    ("olives", "olive", True),
    ("people", "person", True),
    ("take care", "car", False),
    ("cars", "car", True),
    ("a bus", "bu", False),
    ("a glass", "glas", False),
    ("two red cars", "red car", True),
    ("a red sports car", "red car", False),
    ("a CAT's tail", "cat", True),
    ("a catalogue", "cat", False),
    ("Édouard Manet", "edouard manet", True),
    ("anything", "*", False),
]


@pytest.mark.parametrize(("text", "phrase", "found"), MENTIONED)
def test_a_text_mentions_a_phrase_in_singular_and_plural(text: str, phrase: str, found: bool):
    assert mentions(text, phrase) == found


@pytest.mark.parametrize(
    "phrase",
    [
        *("a unicorn", "an apple", "a glass", "an hour", "an unimportant thing", "a ukulele", "a european city"),
        *("an umbrella", "a bus", "a lens", "a glass of water", "a box of toys", "a traffic light"),
        *("water", "red wine", "violence", "grapes", "men", "wolves", "two cats", "my dog", "dogs in snow", "IBM"),
    ],
)
def test_articles(phrase: str):
    assert noun_phrase(re.sub("^an? ", "", phrase)) == phrase


def test_the_readme_lists_every_data_file_with_its_hash():
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|$", (FOLDER / "README.md").read_text(), re.M))
    files = [*FOLDER.glob("*.txt"), *FOLDER.glob("concepts/*")]
    assert listed == {p.relative_to(FOLDER).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
