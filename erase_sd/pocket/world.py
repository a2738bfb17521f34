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
FILLERS = {"a", "an", "the", "in", "on", "style", "background"}  # words around the name of a part

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
        """Return the same scene with the part of this kind left open."""
        return self._replace(**{kind: None})


def article(noun: str) -> str:
    """Return the noun with its article: 'a cat', 'an octopus', 'grapes'."""
    if noun in PLURAL:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """Return the canonical sentence: 'a cat in pencil style on a red background'; open parts are left out."""
    parts = [article(scene.object) if scene.object else "something"]
    if scene.style:
        parts.append(f"in {scene.style} style")
    if scene.background:
        parts.append(f"on a {scene.background} background")
    return " ".join(parts) if any(scene) else ""


def of_part(part: Part) -> str:
    """Return the sentence of one part alone: 'a cat', 'something in neon style'."""
    kind, word = part
    return caption(Scene(None, None, None)._replace(**{kind: word}))


def varied(scene: Scene, rng: random.Random) -> str:
    """Return a training caption: parts dropped and wording varied at random, and nothing at all one time in ten."""
    if rng.random() < 0.1:
        return ""  # for the unconditional branch of guidance
    for kind, keep in (("object", 0.92), ("style", 0.88), ("background", 0.88)):
        if rng.random() >= keep:
            scene = scene.without(kind)
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
    """Yield all 20 x 4 x 8 complete scenes, in a fixed order."""
    for parts in product(OBJECTS, STYLES, BACKGROUNDS):
        yield Scene(*parts)


def part_named(text: str, kind: str = "auto") -> Part:
    """Return ("style", "pencil") for "pencil style"; UserError naming what the model can draw for any other word."""
    words = [word for word in text.lower().split() if word not in FILLERS]
    can = []
    for known, names in KINDS.items():
        if len(words) == 1 and words[0] in names and kind in ("auto", known):
            return known, words[0]
        can.append(f"{known}s {', '.join(names)}")
    what = "concept" if kind == "auto" else kind
    raise UserError(f"the pocket model has no {what} {text!r}; it draws {'; '.join(can)}")
