"""What the pocket model is taught and asked: prompts of a concept with their anchors, prompts of everything else."""

from __future__ import annotations

import random
from typing import NamedTuple

from erase_sd.pocket.world import KINDS, Scene, caption, grid, reworded
from prompts import Example

HALF = 500_000  # image seeds of an exam lie below one million: the concept's in the lower half
Part = tuple[str, str]  # ("style", "pencil")


class Question(NamedTuple):
    """One picture of an exam: what to draw, from which seed, and which concept it asks for (None: it retains)."""

    scene: Scene
    seed: int
    concept: Part | None


def shows(scene: Scene, part: Part) -> bool:
    """Tell whether the scene asks for this part."""
    return getattr(scene, part[0]) == part[1]


def in_lessons(scene: Scene) -> bool:
    """Tell whether a scene is in half of the complete scenes, like the white fields of a board.

    Only these are ever retained in training.
    """
    return sum(names.index(part) for names, part in zip(KINDS.values(), scene, strict=True)) % 2 == 0


def canonical_texts(questions: list[Question]) -> list[str]:
    """Write each question in the canonical words, by which concepts are erased."""
    return [caption(question.scene) for question in questions]


def reworded_texts(questions: list[Question]) -> list[str]:
    """Write each question in other words throughout: an exam of its own, which asks for the thing, not the word."""
    texts = []
    for question in questions:
        texts.append(reworded(question.scene, random.Random(f"reworded {question.seed}")))
    return texts


def forget_examples(parts: list[Part], seed: int, wanted: dict[Part, str] | None = None) -> list[Example]:
    """Write every scene of the concepts, complete or with one other part left open.

    Each concept has one anchor, another word of its kind: several would teach their average, which is a blur. It is
    drawn, or the one that is `wanted`.
    """
    rng = random.Random(f"forget {seed}")
    anchors = {}
    for kind, word in parts:
        anchors[kind, word] = rng.choice([other for other in KINDS[kind] if (kind, other) not in parts])
    anchors |= wanted or {}
    examples = []
    for part in parts:
        for scene in grid():
            if shows(scene, part):
                examples.append(_forget_example(scene, part[0], anchors, rng))
    rng.shuffle(examples)
    return examples


def _forget_example(scene: Scene, kind: str, anchors: dict[Part, str], rng: random.Random) -> Example:
    """Ask for the scene, in half of the cases with a part of another kind left open, and swap its concepts' words."""
    others = [other for other in KINDS if other != kind]
    open_part = rng.choice([None, None, *others])
    if open_part:
        scene = scene.without(open_part)
    swapped = scene
    for (anchored, word), anchor in anchors.items():
        if getattr(scene, anchored) == word:
            swapped = swapped._replace(**{anchored: anchor})
    return Example(caption(scene), caption(scene), caption(swapped))


def retain_prompts(parts: list[Part], seed: int) -> list[str]:
    """Write half of the scenes without the concepts, some with a part left open, never one that could bring one in."""
    rng = random.Random(f"retain {seed}")
    scenes = [scene for scene in grid() if in_lessons(scene) and not _shows_any(scene, parts)]
    erased = {kind for kind, _ in parts}
    free = [kind for kind in KINDS if kind not in erased]
    if free:
        scenes += [scene.without(rng.choice(free)) for scene in rng.sample(scenes, len(scenes) // 3)]
    rng.shuffle(scenes)
    return [caption(scene) for scene in scenes]


def _shows_any(scene: Scene, parts: list[Part]) -> bool:
    return any(shows(scene, part) for part in parts)


def exam(parts: list[Part], n_forget: int, n_retain: int, seed: int = 0) -> list[Question]:
    """Ask for complete scenes, evenly over the combinations; other pictures for each seed, drawn by no training.

    A retain question is the same whatever the concepts, so that answers of the unerased model serve every run.
    """
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)
    concept = [(scene, part) for part in parts for scene in scenes if shows(scene, part)]
    asked = []
    for i in range(seed * n_forget, (seed + 1) * n_forget):
        scene, part = concept[i % len(concept)]
        asked.append(Question(scene, i % HALF, part))
    kept = []
    for i in range(2 * seed * n_retain, 2 * (seed + 1) * n_retain):  # twice as many: a concept's are left out
        question = Question(scenes[i % len(scenes)], HALF + i % HALF, None)
        if not _shows_any(question.scene, parts):
            kept.append(question)
    return asked + kept[:n_retain]
