"""The pocket world: what the embedded model can draw and the sentences that ask for it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from erase_sd.common.errors import UserError

OBJECTS = (
    "cat dog bear frog penguin bird fish octopus turtle snail banana lemon strawberry watermelon "
    "grapes cherries tomato hamburger doughnut cookie"
).split()
STYLES = ["flat", "pencil", "neon", "mosaic"]
BACKGROUNDS = ["white", "black", "red", "green", "blue", "yellow", "pink", "gray"]
KINDS = {"object": OBJECTS, "style": STYLES, "background": BACKGROUNDS}
PLURAL = {"grapes", "cherries"}

Part = tuple[str, str]
"""A kind and a word of it: ("style", "pencil")."""
Answer = dict[str, str]
"""What the oracle sees in a picture, by kind: {"object": "cat", "style": "pencil", "background": "other"}."""


class Scene(NamedTuple):
    """One combination of object, style and background; None is a part the caption leaves open."""

    object: str | None
    style: str | None
    background: str | None

    def without(self, kind: str) -> Scene:
        """The same scene with the part of this kind left open."""
        return self._replace(**{kind: None})


def article(noun: str) -> str:
    """'a cat', 'an octopus', 'grapes'."""
    if noun in PLURAL:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """The canonical sentence: 'a cat in pencil style on a red background'; open parts are left out."""
    parts = [article(scene.object) if scene.object else "something"]
    if scene.style:
        parts.append(f"in {scene.style} style")
    if scene.background:
        parts.append(f"on a {scene.background} background")
    return " ".join(parts) if any(scene) else ""


def of_part(part: tuple[str, str]) -> str:
    """The sentence of one part alone: 'a cat', 'something in neon style'."""
    kind, word = part
    return caption(Scene(None, None, None)._replace(**{kind: word}))


def varied(scene: Scene, rng: random.Random) -> str:
    """A training caption: parts dropped and wording varied at random, now and then nothing at all (for guidance)."""
    if rng.random() < 0.1:
        return ""
    scene = Scene(
        *(part if rng.random() < keep else None for part, keep in zip(scene, (0.92, 0.88, 0.88), strict=True))
    )
    if not any(scene) or rng.random() < 0.55:
        return caption(scene)
    noun = article(scene.object) if scene.object else "something"
    head = rng.choice(["{}", "an image of {}", "a picture of {}", "{}"]).format(noun)
    tails = [f"in {scene.style} style"] if scene.style else []
    if scene.background:
        tails.append(rng.choice(["on a {} background", "on {}", "with a {} background"]).format(scene.background))
    rng.shuffle(tails)
    return ", ".join([head, *tails]) if rng.random() < 0.3 else " ".join([head, *tails])


def grid() -> Iterator[Scene]:
    """All 20 x 4 x 8 complete scenes, in a fixed order."""
    return (Scene(*parts) for parts in product(OBJECTS, STYLES, BACKGROUNDS))


def part_named(text: str, kind: str = "auto") -> tuple[str, str]:
    """("style", "pencil") for "pencil style"; UserError naming what the pocket model can draw for any other word."""
    words = [w for w in text.lower().split() if w not in ("a", "an", "the", "in", "on", "style", "background")]
    for known, names in KINDS.items():
        if len(words) == 1 and words[0] in names and kind in ("auto", known):
            return known, words[0]
    can = "; ".join(f"{known}s {', '.join(names)}" for known, names in KINDS.items())
    raise UserError(f"the pocket model has no {'concept' if kind == 'auto' else kind} {text!r}; it draws {can}")
