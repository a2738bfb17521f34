"""Sentences that ask for a concept given as free text, each beside its anchor: the same sentence without the concept.

An object leaves "an object" behind, since free text does not tell the class it belongs to (`--anchor "a dog"` does),
a named person leaves "a person"; a style, a background or an attribute is left out, and the rest of the image is to
stay.
"""

from typing import Literal

Kind = Literal["object", "style", "background", "attribute", "person"]

VIEWS = (
    "{noun}",
    "a photo of {noun}",
    "an image of {noun}",
    "a picture of {noun}",
    "a close-up photo of {noun}",
    "a drawing of {noun}",
    "a painting of {noun}",
    "a photo of {noun} outdoors",
)
SCENES = (
    "a house by a lake",
    "a tree on a hill",
    "a rainy city street",
    "a boat at sea",
    "a bowl of fruit",
    "a horse in a field",
    "a portrait of a woman in a coat",
    "a portrait of a man in a hat",
)
THINGS = ("a cup", "a chair", "a shoe", "a flower", "a bicycle", "a teapot", "a robot", "a dog")
PEOPLE = (
    "a person",
    "a woman",
    "a man",
    "a group of people",
    "a photo of a person",
    "a portrait of a woman",
    "a portrait of a man",
    "a drawing of a person",
)

TEMPLATES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "object": tuple((view, view.format(noun="an object")) for view in VIEWS),
    "style": (
        *((scene + " in {word} style", scene) for scene in SCENES[::2]),
        *((scene + " in the style of {word}", scene) for scene in SCENES[1::2]),
    ),
    "background": tuple((thing + " on {background}", thing) for thing in THINGS),
    "attribute": tuple((person + ", {word}", person) for person in PEOPLE),
    "person": tuple((view.format(noun="{word}"), view.format(noun="a person")) for view in VIEWS),
}
