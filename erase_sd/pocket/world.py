"""The pocket world: what the embedded model can draw and the sentences that ask for it.

Every thing has one canonical word, by which it is erased, and two or three other wordings, which the model knows as
well: they tell whether the thing went or only the word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from erase_sd.common.errors import UserError

OTHER_OBJECTS = {
    "cat": ["kitten", "feline"],
    "dog": ["puppy", "hound"],
    "bear": ["grizzly", "bruin"],
    "frog": ["toad", "amphibian"],
    "penguin": ["waddler", "antarctic swimmer"],
    "bird": ["sparrow", "songbird"],
    "fish": ["trout", "minnow"],
    "octopus": ["cephalopod", "kraken"],
    "turtle": ["tortoise", "terrapin"],
    "snail": ["gastropod", "escargot"],
    "banana": ["plantain", "peeled tropical fruit"],
    "lemon": ["citron", "citrus"],
    "strawberry": ["fraise", "garden berry"],
    "watermelon": ["melon", "melon slice"],
    "grapes": ["muscats", "vine fruit"],
    "cherries": ["morellos", "stone fruits"],
    "tomato": ["pomodoro", "love apple"],
    "hamburger": ["burger", "cheeseburger", "beef patty sandwich"],
    "doughnut": ["donut", "glazed ring"],
    "cookie": ["biscuit", "chocolate chip snack"],
}
OTHER_STYLES = {
    "flat": ["as clip art", "as a vector illustration"],
    "pencil": ["sketched with a pencil", "as a graphite drawing"],
    "neon": ["glowing like a neon sign", "with a fluorescent glow"],
    "mosaic": ["made of mosaic tiles", "as pixel art", "built from square stones"],
}
OTHER_BACKGROUNDS = {
    "white": ["snowy", "ivory"],
    "black": ["ebony", "onyx"],
    "red": ["crimson", "scarlet"],
    "green": ["emerald", "grassy"],
    "blue": ["azure", "cobalt"],
    "yellow": ["golden", "canary"],
    "pink": ["rosy", "blush"],
    "gray": ["ashen", "slate"],
}
OTHER_WORDINGS = {"object": OTHER_OBJECTS, "style": OTHER_STYLES, "background": OTHER_BACKGROUNDS}
OBJECTS, STYLES, BACKGROUNDS = list(OTHER_OBJECTS), list(OTHER_STYLES), list(OTHER_BACKGROUNDS)
KINDS = {"object": OBJECTS, "style": STYLES, "background": BACKGROUNDS}
Part = tuple[str, str]
"""A kind and a word of it: ("style", "pencil")."""
Answer = dict[str, str]
"""What the oracle sees in a picture, by kind: {"object": "cat", "style": "pencil", "background": "other"}."""

FILLERS = {"a", "an", "the", "in", "on", "style", "background"}  # words around the name of a part
WITHOUT_ARTICLE = {"grapes", "muscats", "vine fruit", "cherries", "morellos", "stone fruits"}
FRAMES = ["{}", "{}", "an image of {}", "a picture of {}"]
GROUND_FRAMES = ["on {} background", "with {} background", "against {} background"]


class Scene(NamedTuple):
    """One combination of object, style and background; None is a part the caption leaves open."""

    object: str | None
    style: str | None
    background: str | None

    def without(self, kind: str) -> Scene:
        """Return the same scene with the part of this kind left open."""
        return self._replace(**{kind: None})


def article(noun: str) -> str:
    """Put the article before a noun: 'a cat', 'an octopus', 'grapes'."""
    if noun in WITHOUT_ARTICLE:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def canonical(kind: str, word: str) -> str:
    """Return what a caption says of a part in its canonical word: 'a cat', 'in neon style', 'a red'."""
    return f"in {word} style" if kind == "style" else article(word)


def other_wordings(kind: str, word: str) -> list[str]:
    """Return what a caption may say of a part instead: ['a kitten', 'a feline'], ['as clip art', ...]."""
    others = OTHER_WORDINGS[kind][word]
    return others if kind == "style" else [article(other) for other in others]


def phrases(scene: Scene, rng: random.Random | None = None, others: float = 1.0) -> dict[str, str]:
    """Word each part that is not open: by its canonical word, or with an rng in other words at the rate `others`."""
    worded = {}
    for kind, word in scene._asdict().items():
        if word is None:
            continue
        if rng is not None and rng.random() < others:
            worded[kind] = rng.choice(other_wordings(kind, word))
        else:
            worded[kind] = canonical(kind, word)
    return worded


def sentence(worded: dict[str, str]) -> str:
    """Join the phrases of `phrases`: 'a cat in pencil style on a red background'; nothing gives ''."""
    if not worded:
        return ""
    parts = [worded.get("object", "something")]
    if "style" in worded:
        parts.append(worded["style"])
    if "background" in worded:
        parts.append(f"on {worded['background']} background")
    return " ".join(parts)


def caption(scene: Scene) -> str:
    """Write the canonical sentence; open parts are left out."""
    return sentence(phrases(scene))


def reworded(scene: Scene, rng: random.Random) -> str:
    """Write the sentence with every part in one of its other wordings."""
    return sentence(phrases(scene, rng))


def of_part(part: tuple[str, str]) -> str:
    """Write the sentence of one part alone: 'a cat', 'something in neon style'."""
    kind, word = part
    return caption(Scene(None, None, None)._replace(**{kind: word}))


def varied(scene: Scene, rng: random.Random) -> str:
    """Write a training caption: parts dropped, words and order varied, now and then nothing at all (for guidance)."""
    if rng.random() < 0.1:
        return ""
    kept = []
    for part, keep in zip(scene, (0.92, 0.88, 0.88), strict=True):
        kept.append(part if rng.random() < keep else None)
    worded = phrases(Scene(*kept), rng, others=0.5)
    if not worded or rng.random() < 0.6:
        return sentence(worded)
    head = rng.choice(FRAMES).format(worded.get("object", "something"))
    tails = [worded["style"]] if "style" in worded else []
    if "background" in worded:
        tails.append(rng.choice(GROUND_FRAMES).format(worded["background"]))
    rng.shuffle(tails)
    return (", " if rng.random() < 0.3 else " ").join([head, *tails])


def grid() -> Iterator[Scene]:
    """Yield all 20 x 4 x 8 complete scenes, in a fixed order."""
    for parts in product(OBJECTS, STYLES, BACKGROUNDS):
        yield Scene(*parts)


def part_named(text: str, kind: str = "auto") -> Part:
    """Find ("style", "pencil") for "pencil style"; UserError naming what the model can draw for any other word."""
    words = [word for word in text.lower().split() if word not in FILLERS]
    for known, names in KINDS.items():
        if len(words) == 1 and words[0] in names and kind in ("auto", known):
            return known, words[0]
    can = "; ".join(f"{known}s {', '.join(names)}" for known, names in KINDS.items())
    raise UserError(f"the pocket model has no {'concept' if kind == 'auto' else kind} {text!r}; it draws {can}")
