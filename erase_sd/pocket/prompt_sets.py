"""Prompt sets of the pocket model: of a concept, with anchors; of what is retained; of the evaluation."""

from __future__ import annotations

import random
from typing import NamedTuple

from erase_sd.pocket.world import KINDS, Part, Scene, caption, grid, reworded
from prompts import Example

HALF = 500_000  # image seeds of an evaluation lie below one million: the concept's in the lower half


class Question(NamedTuple):
    """One image of an evaluation: scene, seed, and the concept it asks for (None where it asks what is retained)."""

    scene: Scene
    seed: int
    concept: Part | None


def shows(scene: Scene, part: Part) -> bool:
    """Return whether the scene asks for this part."""
    return getattr(scene, part[0]) == part[1]


def shows_any(scene: Scene, parts: list[Part]) -> bool:
    """Return whether the scene asks for one of these parts."""
    return any(shows(scene, part) for part in parts)


def retained_in_training(scene: Scene) -> bool:
    """Return whether a complete scene may be in the retain set: half are, like the white fields of a board."""
    total = 0
    for names, part in zip(KINDS.values(), scene, strict=True):
        total += names.index(part)
    return total % 2 == 0


def forget_examples(parts: list[Part], seed: int, wanted: dict[Part, str] | None = None) -> list[Example]:
    """Return every scene of the concepts, complete or with one other part left open.

    Each concept has one anchor, another word of its kind: several would teach their average, which is a blur. It is
    drawn at random, unless `wanted` names it.
    """
    rng = random.Random(f"forget {seed}")
    anchors: dict[Part, str] = {}
    for kind, word in parts:
        anchors[kind, word] = rng.choice([other for other in KINDS[kind] if (kind, other) not in parts])
    anchors |= wanted or {}
    examples: list[Example] = []
    for part in parts:
        for scene in grid():
            if shows(scene, part):
                examples.append(_example(scene, part[0], anchors, rng))
    rng.shuffle(examples)
    return examples


def _example(scene: Scene, kind: str, anchors: dict[Part, str], rng: random.Random) -> Example:
    """Return a scene of a concept of this kind, half of the time with another part left open, beside its anchor."""
    others = [other for other in KINDS if other != kind]
    open_part = rng.choice([None, None, *others])
    if open_part:
        scene = scene.without(open_part)
    anchored = scene
    for part, anchor in anchors.items():
        if shows(scene, part):
            anchored = anchored._replace(**{part[0]: anchor})
    text = caption(scene)
    return Example(text, text, caption(anchored))


def retain_prompts(parts: list[Part], seed: int) -> list[str]:
    """Return half of the scenes without the concepts, and some of them again with a part left open.

    Never is a part left open that could bring a concept in.
    """
    rng = random.Random(f"retain {seed}")
    scenes: list[Scene] = []
    for scene in grid():
        if retained_in_training(scene) and not shows_any(scene, parts):
            scenes.append(scene)
    erased = {kind for kind, _ in parts}
    free = [kind for kind in KINDS if kind not in erased]
    if free:
        for scene in rng.sample(scenes, len(scenes) // 3):
            scenes.append(scene.without(rng.choice(free)))
    rng.shuffle(scenes)
    return list(map(caption, scenes))


def owners(examples: list[Example], parts: list[Part]) -> list[int]:
    """Return for each example which of the parts it asks for; of several at once they take turns."""
    found = []
    for i, example in enumerate(examples):
        words = example.caption.split()
        asked = [which for which, (_, word) in enumerate(parts) if word in words]
        found.append(asked[i % len(asked)])
    return found


def exam(parts: list[Part], n_forget: int, n_retain: int, seed: int = 0) -> list[Question]:
    """Return an evaluation's questions: complete scenes, evenly over the combinations, with seeds of their own.

    Each `seed` gives other images, none of which any training samples. A retain question is the same whatever the
    concepts, so that answers of the original model serve every run.
    """
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)
    of_part: dict[Part, list[Scene]] = {}
    for part in parts:
        of_part[part] = [scene for scene in scenes if shows(scene, part)]
    forget: list[Question] = []
    for i in range(seed * n_forget, (seed + 1) * n_forget):  # the concepts take turns: each is asked as often
        turn, which = divmod(i, len(parts))
        part = parts[which]
        forget.append(Question(of_part[part][turn % len(of_part[part])], i % HALF, part))
    retain: list[Question] = []
    for i in range(2 * seed * n_retain, 2 * (seed + 1) * n_retain):  # twice as many: those with a concept are left out
        scene = scenes[i % len(scenes)]
        if not shows_any(scene, parts):
            retain.append(Question(scene, HALF + i % HALF, None))
    return forget + retain[:n_retain]


def canonical_texts(questions: list[Question]) -> list[str]:
    """Return each question in the canonical words, by which concepts are erased."""
    return [caption(question.scene) for question in questions]


def reworded_texts(questions: list[Question]) -> list[str]:
    """Return each question in other words throughout: an evaluation of its own, which asks for the thing."""
    texts = []
    for question in questions:
        texts.append(reworded(question.scene, random.Random(f"reworded {question.seed}")))
    return texts
