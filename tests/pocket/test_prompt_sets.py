"""Prompt sets of the pocket model: no training sees the evaluation, no retain prompt brings the concept in."""

import pytest

from erase_sd.common.errors import UserError
from erase_sd.denoising.samples import seeds
from erase_sd.pocket import prompt_sets
from erase_sd.pocket.world import KINDS, Scene, caption, grid, part_named

PARTS = {
    "object": [("object", "cat")],
    "style": [("style", "pencil")],
    "background": [("background", "red")],
    "two objects": [("object", "cat"), ("object", "dog")],
    "three kinds": [("object", "grapes"), ("style", "neon"), ("background", "blue")],
}
each = pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)


def words(text: str) -> set[str]:
    return set(text.split())


@each
def test_image_seeds_of_the_evaluation_are_never_used_in_training(parts: list) -> None:
    asked = {q.seed for q in prompt_sets.exam(parts, 500, 5000)}
    trained: set[int] = set()
    for run in range(20):
        for purpose in (0, 1):
            trained.update(seeds(run, purpose, 50_000))
    assert len(asked) == 5500
    assert not asked & trained
    assert max(asked) < 1_000_000


def test_image_seeds_of_different_runs_and_sets_differ() -> None:
    drawn = [set(seeds(run, purpose, 1000)) for run in range(5) for purpose in (0, 1)]
    assert len(set().union(*drawn)) == sum(map(len, drawn))


@each
def test_half_of_the_combinations_are_never_retained(parts: list) -> None:
    complete = {caption(scene) for scene in grid()}
    seen = {text for seed in range(10) for text in prompt_sets.retain_prompts(parts, seed)} & complete
    allowed = {caption(s) for s in grid() if not prompt_sets.shows_any(s, parts)}
    assert seen < allowed
    assert len(seen) == pytest.approx(len(allowed) / 2, rel=0.01)
    assert len({s for s in grid() if prompt_sets.retained_in_training(s)}) == 320


@each
def test_no_retain_prompt_shows_or_could_bring_in_the_concept(parts: list) -> None:
    forbidden, erased = {word for _, word in parts}, {kind for kind, _ in parts}
    for text in prompt_sets.retain_prompts(parts, 0):
        assert not words(text) & forbidden
        for kind in erased:  # a kind left open could be drawn as anything, the concept included
            assert words(text) & set(KINDS[kind]), text


@each
def test_forget_prompts_ask_for_every_concept(parts: list) -> None:
    examples = prompt_sets.forget_examples(parts, 0)
    assert all(words(e.prompt) & {word for _, word in parts} and e.caption == e.prompt for e in examples)
    for kind, word in parts:
        assert sum(word in words(e.prompt) for e in examples) >= len(list(grid())) // len(KINDS[kind])


@pytest.mark.parametrize("name", PARTS)
def test_no_anchor_names_an_erased_concept(name: str) -> None:
    forbidden = {word for _, word in PARTS[name]}
    assert not any(words(e.anchor) & forbidden for e in prompt_sets.forget_examples(PARTS[name], 0))


@pytest.mark.parametrize("name", ["object", "style", "background", "two objects"])
def test_an_anchor_changes_one_part_only(name: str) -> None:
    for example in prompt_sets.forget_examples(PARTS[name], 1):
        change = words(example.prompt) ^ words(example.anchor)
        assert len(change - {"a", "an"}) == 2, example


def test_prompt_sets_depend_on_the_seed_alone() -> None:
    parts = PARTS["object"]
    assert prompt_sets.forget_examples(parts, 3) == prompt_sets.forget_examples(parts, 3)
    assert prompt_sets.forget_examples(parts, 3) != prompt_sets.forget_examples(parts, 4)
    assert prompt_sets.retain_prompts(parts, 3) != prompt_sets.retain_prompts(parts, 4)


@each
def test_the_evaluation_is_complete_scenes_evenly_spread(parts: list) -> None:
    questions = prompt_sets.exam(parts, 200, 1000)
    forget, retain = [q for q in questions if q.concept], [q for q in questions if not q.concept]
    assert (len(forget), len(retain)) == (200, 1000)
    assert all(all(q.scene) for q in questions)
    assert all(prompt_sets.shows(q.scene, q.concept) for q in forget)
    assert {q.concept for q in forget} == set(parts)
    assert not any(prompt_sets.shows_any(q.scene, parts) for q in retain)
    assert len({(q.seed, q.scene) for q in questions}) == len(questions)
    asked = {q.scene for q in retain}
    left = sum(not prompt_sets.shows_any(s, parts) for s in grid())
    assert len(asked) == min(left, 1000)
    trained = sum(map(prompt_sets.retained_in_training, asked))
    assert 0.4 < trained / len(asked) < 0.6  # the half that is never retained is asked too


def test_a_retain_question_is_the_same_for_every_concept() -> None:
    """So that the original model is sampled once for all runs."""
    one, two = (
        {(q.seed, q.scene) for q in prompt_sets.exam(PARTS[n], 0, 1000) if not q.concept} for n in ("object", "style")
    )
    shared = {s for _, s in one} & {s for _, s in two}
    first_round = {pair for pair in one if pair[1] in shared and pair[0] < 501_000}
    assert first_round <= one & two
    assert len(first_round) > 400


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cat", ("object", "cat")),
        ("a Cat", ("object", "cat")),
        ("an octopus", ("object", "octopus")),
        ("pencil style", ("style", "pencil")),
        ("in neon style", ("style", "neon")),
        ("on a red background", ("background", "red")),
        ("grapes", ("object", "grapes")),
    ],
)
def test_words_are_found(text: str, part: tuple) -> None:
    assert part_named(text) == part == part_named(text, part[0])


@pytest.mark.parametrize(
    ("text", "kind"), [("dragon", "auto"), ("nudity", "auto"), ("cat dog", "auto"), ("cat", "style")]
)
def test_an_unknown_word_is_answered_with_all_the_known_ones(text: str, kind: str) -> None:
    with pytest.raises(UserError, match=f"{text!r}") as error:
        part_named(text, kind)
    assert all(word in str(error.value) for names in KINDS.values() for word in names)


def test_sentences() -> None:
    assert caption(Scene("cat", "pencil", "red")) == "a cat in pencil style on a red background"
    assert caption(Scene("octopus", None, None)) == "an octopus"
    assert caption(Scene("cherries", None, None)) == "cherries"
    assert caption(Scene(None, "neon", None)) == "something in neon style"
    assert caption(Scene(None, None, None)) == ""
    assert len({caption(scene) for scene in grid()}) == 640
