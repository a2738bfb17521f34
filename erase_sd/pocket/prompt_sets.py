"""What the pocket model is taught and asked: prompts of a concept with their anchors, prompts of everything else."""

from __future__ import annotations

import random
from typing import NamedTuple

from erase_sd.pocket.world import KINDS, Part, Scene, caption, grid
from prompts import Example

HALF = 500_000  # image seeds of an exam lie below one million: the concept's in the lower half


class Question(NamedTuple):
    """One picture of an exam: what to draw, from which seed, and which concept it asks for (None: it retains)."""

    scene: Scene
    seed: int
    concept: Part | None


def shows(scene: Scene, part: Part) -> bool:
    """Whether the scene asks for this part."""
    return getattr(scene, part[0]) == part[1]


def in_lessons(scene: Scene) -> bool:
    """Half of the complete scenes, like the white fields of a board: only these are ever retained in training."""
    return sum(names.index(part) for names, part in zip(KINDS.values(), scene, strict=True)) % 2 == 0


def forget_examples(parts: list[Part], seed: int, wanted: dict[Part, str] | None = None) -> list[Example]:
    """Every scene of the concepts, complete or with one other part left open.

    Each concept has one anchor, another word of its kind: several would teach their average, which is a blur. It is
    drawn, or the one that is `wanted`.
    """
    rng, examples = random.Random(f"forget {seed}"), []
    anchors = {(kind, word): rng.choice([x for x in KINDS[kind] if (kind, x) not in parts]) for kind, word in parts}
    anchors |= wanted or {}
    for kind, word in parts:
        for scene in (s for s in grid() if shows(s, (kind, word))):
            open_part = rng.choice([None, None, *(k for k in KINDS if k != kind)])
            scene = scene.without(open_part) if open_part else scene
            swapped = {part[0]: anchor for part, anchor in anchors.items() if shows(scene, part)}
            text = caption(scene)
            examples.append(Example(text, text, caption(scene._replace(**swapped))))
    rng.shuffle(examples)
    return examples


def retain_prompts(parts: list[Part], seed: int) -> list[str]:
    """Half of the scenes without the concepts, some with a part left open, never one that could bring a concept in."""
    rng, erased = random.Random(f"retain {seed}"), {kind for kind, _ in parts}
    scenes = [s for s in grid() if in_lessons(s) and not any(shows(s, part) for part in parts)]
    free = [kind for kind in KINDS if kind not in erased]
    opened = [s.without(rng.choice(free)) for s in rng.sample(scenes, len(scenes) // 3)] if free else []
    rng.shuffle(scenes := scenes + opened)
    return [caption(scene) for scene in scenes]


def exam(parts: list[Part], n_forget: int, n_retain: int, seed: int = 0) -> list[Question]:
    """Complete scenes, evenly over the combinations; other pictures for each seed, none of which any training draws.

    A retain question is the same whatever the concepts, so that answers of the unerased model serve every run.
    """
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)
    concept = [(scene, part) for part in parts for scene in scenes if shows(scene, part)]
    turns = range(seed * n_forget, (seed + 1) * n_forget)
    asked = [Question(concept[i % len(concept)][0], i % HALF, concept[i % len(concept)][1]) for i in turns]
    turns = range(2 * seed * n_retain, 2 * (seed + 1) * n_retain)  # twice as many: those with a concept are left out
    kept = [Question(scenes[i % len(scenes)], HALF + i % HALF, None) for i in turns]
    return asked + [q for q in kept if not any(shows(q.scene, part) for part in parts)][:n_retain]
