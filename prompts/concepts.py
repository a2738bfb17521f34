"""What to ask a model for: concepts to forget and everyday captions to retain.

    concept = load("cat")          # or "neon style", "red background", or a file of prompts/concepts: "nudity"
    concept.examples[1].prompt     # "a photo of a cat": draws the concept
    concept.examples[1].anchor     # "a photo of an object": the same sentence without it
    captions(without=concept)      # what the model has to keep drawing

Broken input is a ValueError, whose text is for the user; prompts/README.md tells where the files come from.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from prompts.templates import TEMPLATES, Kind, noun_phrase

FOLDER = Path(__file__).parent
LONGEST = 200  # characters; CLIP reads 77 tokens, templates included
WORDED = (  # kinds that show in the wording; everything else is taken for an object
    ("style", r"(?:.* )?in the style of (?P<word>.+)"),
    ("style", r"(?:in )?(?P<word>.+) style"),
    ("background", r"(?:on |with )?(?P<word>.+) background"),
)


class Example(NamedTuple):
    """One way to ask for a concept: its prompt, caption c_f and anchor c_a."""

    prompt: str  # draws the image to forget
    caption: str  # c_f, the text this image is trained under
    anchor: str  # what the model may draw instead
    seed: int | None = None  # of its picture in an evaluation, where the source gives one


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Something a model shall no longer draw. `words` name it, without articles and without the name of its kind."""

    name: str
    kind: Kind
    words: tuple[str, ...]
    examples: tuple[Example, ...]

    def names(self, text: str) -> bool:
        """Return whether a text mentions a word of the concept, singular or plural."""
        return any(_stems(word) in _stems(text) for word in self.words)


def load(name: str, kind: Kind | Literal["auto"] = "auto", anchor: str | None = None) -> Concept:
    """Read the concept file of this name or, if there is none, build the concept from the text itself.

    `kind="auto"` goes by the wording: "neon style" and "in the style of X" are styles, "red background" is a
    background, all else an object. `anchor` replaces the anchor of every example. Raises ValueError for a text that is
    empty, longer than 200 characters or not printable, an unknown kind, and a broken concept file.
    """
    name = _checked(name, "concept")
    if kind not in ("auto", *TEMPLATES):
        raise ValueError(f"unknown kind {kind!r}: use one of auto, {', '.join(TEMPLATES)}")
    concept = _from_text(name, kind)
    for path in FOLDER.glob("concepts/*.json"):
        if path.stem == name.lower():
            concept = _from_file(path, kind)
    if anchor is None:
        return concept
    anchor = _checked(anchor, "anchor")
    examples = [example._replace(anchor=anchor) for example in concept.examples]
    return replace(concept, examples=tuple(examples))


def captions(without: Concept | None = None) -> list[str]:
    """Return the retain captions, less those that mention a word of the concept `without`, singular or plural."""
    lines = (FOLDER / "retain.txt").read_text(encoding="utf-8").splitlines()
    if without is None:
        return lines
    return [line for line in lines if not without.names(line)]


def _from_text(text: str, kind: Kind | Literal["auto"]) -> Concept:
    """Build the concept from templates: "neon style" is the style whose word is "neon"."""
    worded, word = _worded(text)
    kind = worded if kind == "auto" else kind
    word = word if kind == worded else text
    word = re.sub(r"^(an?|the) ", "", word)
    examples = []
    for template, anchor in TEMPLATES[kind]:
        prompt = template.format(word=word, noun=noun_phrase(word), background=noun_phrase(f"{word} background"))
        examples.append(Example(prompt, prompt, anchor))
    return Concept(name=text, kind=kind, words=(word,), examples=tuple(examples))


def _worded(text: str) -> tuple[Kind, str]:
    """Return ("style", "neon") for "neon style": the kind that the wording tells, and what is left of the text."""
    for kind, pattern in WORDED:
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            return kind, match["word"]
    return "object", text


def _from_file(path: Path, kind: Kind | Literal["auto"]) -> Concept:
    """Read a concept file, whose fields prompts/README.md lists."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        examples = [Example(**example) for example in fields["examples"]]
        words = tuple(fields["words"])
        concept = Concept(name=path.stem, kind=fields["kind"], words=words, examples=tuple(examples))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a concept file ({error!r}): compare it with nudity.json") from error
    if concept.kind not in TEMPLATES or not concept.words or not examples:
        raise ValueError(f"{path}: needs a kind out of {', '.join(TEMPLATES)}, words and examples")
    if kind not in ("auto", concept.kind):
        raise ValueError(f"{path} says that {concept.name} is of kind {concept.kind}, not {kind}: leave the kind out")
    return concept


def _checked(text: str, what: str) -> str:
    """Return `text` with single spaces; ValueError if no prompt can be made of it."""
    text = text.strip()
    if not text:
        raise ValueError(f"the {what} is empty: give a word or a phrase, such as cat or 'neon style'")
    if not text.isprintable():
        raise ValueError(f"the {what} {text!r} has unprintable characters: give it on one line, without tabs")
    if len(text) > LONGEST:
        raise ValueError(f"the {what} {text[:20]!r}... has {len(text)} characters: give at most {LONGEST}")
    return " ".join(text.split())


def _stems(text: str) -> str:
    """Return the words of `text` less their plural endings, set in spaces, so that phrases match at word ends only."""
    stems = []
    for word in re.findall(r"\w+", text.lower()):
        stems.append(re.sub(r"(ies|es|y|s|e)$", "", word))
    return f" {' '.join(stems)} "
