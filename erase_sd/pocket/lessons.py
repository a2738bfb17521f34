"""What the pocket model is taught and asked: prompts of a concept with their anchors, prompts of everything else."""

from __future__ import annotations

import random
from typing import NamedTuple

from erase_sd.pocket.captions import KINDS, Scene, caption, grid
from prompts import Example

Part = tuple[str, str]  # ("style", "pencil")


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


def forget_examples(parts: list[Part], seed: int) -> list[Example]:
    """Every scene of the concepts, complete or with one other part left open.

    Each concept has one anchor, another word of its kind: several would teach their average, which is a blur.
    """
    rng, examples = random.Random(f"forget {seed}"), []
    for kind, word in parts:
        anchor = rng.choice([name for name in KINDS[kind] if (kind, name) not in parts])
        for scene in (s for s in grid() if shows(s, (kind, word))):
            open_part = rng.choice([None, None, *(k for k in KINDS if k != kind)])
            scene = scene.without(open_part) if open_part else scene
            text = caption(scene)
            examples.append(Example(text, text, caption(scene._replace(**{kind: anchor}))))
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


def exam(parts: list[Part], n_forget: int, n_retain: int) -> list[Question]:
    """Complete scenes, evenly over the combinations; image seeds below one million, which no training draws.

    A retain question is the same whatever the concepts, so that answers of the unerased model serve every run.
    """
    scenes = list(grid())
    random.Random("exam").shuffle(scenes)
    concept = [(scene, part) for part in parts for scene in scenes if shows(scene, part)]
    asked = [Question(concept[i % len(concept)][0], i, concept[i % len(concept)][1]) for i in range(n_forget)]
    others = [(i, scene) for i, scene in enumerate(scenes) if not any(shows(scene, part) for part in parts)]
    rounds = range(-(-n_retain // len(others)))
    kept = [Question(scene, 500_000 + 1000 * again + i, None) for again in rounds for i, scene in others]
    return asked + kept[:n_retain]
