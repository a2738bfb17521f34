"""What to ask a model for: concepts to forget and everyday captions to retain.

    concept = load("cat")          # or "neon style", "Van Gogh", a file by its name or a word of it, or its path
    concept.examples[1].prompt     # "a photo of a cat": draws the concept
    concept.examples[1].anchor     # "a photo of an object": the same sentence without it
    captions(concept)              # what the model has to keep drawing
    sensitive("nude people")       # whether pictures of a text are to be hidden

Broken input is a ValueError, whose text is for the user; prompts/README.md tells where the files come from.
"""

import json
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prompts.english import mentions, noun_phrase, same
from prompts.templates import TEMPLATES, Kind

FOLDER = Path(__file__).parent
LONGEST = 200  # characters; CLIP reads 77 tokens, templates included
WORDED: tuple[tuple[Kind, str], ...] = (  # kinds that show in the wording
    ("style", r"(?:.* )?in the style of (?P<word>.+)"),
    ("style", r"(?:in )?(?P<word>.+) style"),
    ("style", r"(?:an? |the )?(?:paintings?|artworks?|art|drawings?) by (?P<word>.+)"),
    ("background", r"(?:on |with )?(?P<word>.+) background"),
)
LISTED: tuple[tuple[Kind, str], ...] = (("style", "artists.txt"), ("person", "celebrities.txt"))  # and in a name
FILES = (".json", ".txt", ".csv", ".jsonl", ".yaml", ".yml")  # what ends so was meant as a path


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
    aliases: tuple[str, ...] = ()  # more names for it
    evaluation: tuple[Example, ...] = ()  # what a published evaluation draws, where it is not the examples
    retain: tuple[str, ...] = ()  # what to keep next to it, beside the everyday captions
    sensitive: bool = False  # its pictures are to be hidden
    file: str | None = None  # the concept file that it was read from

    def names(self, text: str) -> bool:
        """Return whether a text mentions a word or another name of the concept, singular or plural."""
        return mentions(text, *self.words, *self.aliases)


def load(name: str, kind: Kind | Literal["auto"] = "auto", anchor: str | None = None) -> Concept:
    """Read the concept file that is meant or, if there is none, build the concept from the text itself.

    A file of prompts/concepts is meant by its name or by any of its words ("nude" is nudity), another one by its path.
    `kind="auto"` goes by the wording and by lists of names: "neon style" and "Van Gogh" are styles, "red background"
    is a background, "Tom Cruise" a person, all else an object. `anchor` replaces the anchor of every example. Raises
    ValueError for a text that is empty, longer than 200 characters, not printable, a list or the path of nothing, an
    unknown kind, and a broken concept file.
    """
    if kind not in ("auto", *TEMPLATES):
        raise ValueError(f"unknown kind {kind!r}: use one of auto, {', '.join(TEMPLATES)}")
    path = _path(name.strip()) if name.isprintable() else None
    if path is None:
        name = _checked(name, "concept")
        check_single(name)
        path = _file_of(name)
    concept = _from_file(path, kind) if path else _from_text(name, kind)
    if anchor is None:
        return concept
    anchor = _checked(anchor, "anchor")
    examples = [example._replace(anchor=anchor) for example in concept.examples]
    return replace(concept, examples=tuple(examples))


def captions(*without: Concept) -> list[str]:
    """Return the retain captions, with those that the concepts `without` bring, evenly spread among the others.

    Those that mention a word of one of the concepts are left out.
    """
    lists = [(FOLDER / "retain.txt").read_text(encoding="utf-8").splitlines()]
    for concept in without:
        lists.append(list(concept.retain))
    placed: dict[str, float] = {}
    for lines in lists:
        for i, line in enumerate(lines):
            placed.setdefault(line, (i + 0.5) / len(lines))
    kept = []
    for line in sorted(placed, key=placed.__getitem__):  # sorting is stable
        if not any(concept.names(line) for concept in without):
            kept.append(line)
    return kept


def people() -> list[str]:
    """Return captions of people in clothes that no concept trains on: who is still drawn after nudity was erased."""
    return (FOLDER / "people.txt").read_text(encoding="utf-8").splitlines()


def sensitive(text: str) -> bool:
    """Return whether a text mentions a word or another name of a concept file that says it is sensitive.

    This one function decides which pictures are hidden, wherever a concept, a prompt or a source is shown.
    """
    return mentions(text, *_sensitive_words(FOLDER))


def called(text: str) -> str:
    """Return what to call a concept: the name of a concept file that was given by its path, else the text itself."""
    return Path(text).stem if text.lower().endswith(".json") else text


@cache
def _sensitive_words(folder: Path) -> tuple[str, ...]:
    words: list[str] = []
    for path in sorted(folder.glob("concepts/*.json")):
        concept = _from_file(path, "auto")
        if concept.sensitive:
            words += [concept.name, *concept.words, *concept.aliases]
    return tuple(dict.fromkeys(words))


def _path(text: str) -> Path | None:
    """Return the concept file whose path the text is, or None for words. Raises ValueError for the path of nothing."""
    suffix = Path(text).suffix.lower()
    if "/" not in text and "\\" not in text and not text.startswith("~") and suffix not in FILES:
        return None
    path = os.path.expanduser(text)
    if not os.path.isfile(path):  # which is False for names that are too long, where Path.is_file raises
        what = "is a folder" if os.path.isdir(path) else "looks like a path, and there is no such file"
        raise ValueError(f"the concept {text!r} {what}: give words such as cat, or the path of a concept file (.json)")
    if suffix != ".json":
        raise ValueError(f"the concept {text!r} is a file, but no concept file (.json): give words such as cat")
    return Path(path)


def check_single(name: str) -> None:
    """Raise ValueError for several concepts in one text."""
    parts = list(filter(None, map(str.strip, re.split("[,;]", name))))
    if len(parts) > 1:
        each = " ".join(f"'{part}'" if " " in part else part for part in parts)
        raise ValueError(
            f"the concept {name!r} looks like {len(parts)} in one text: to erase each of them, give --concept {each}, "
            "to erase them as one, leave out the commas"
        )


def _file_of(name: str) -> Path | None:
    """Return the file of prompts/concepts that is called so, or has the name among its words."""
    paths = sorted(FOLDER.glob("concepts/*.json"))
    for path in paths:
        if path.stem == name.lower():
            return path
    for path in paths:
        known = _from_file(path, "auto")
        if any(same(name, word) for word in (*known.words, *known.aliases)):
            return path
    return None


def _from_text(text: str, kind: Kind | Literal["auto"]) -> Concept:
    """Build the concept from templates: "neon style" is the style whose word is "neon"."""
    told, word = _told(text)
    kind = told if kind == "auto" else kind
    word = word if kind == told else text
    word = re.sub(r"^(an?|the) ", "", word)
    examples = []
    for template, anchor in TEMPLATES[kind]:
        prompt = template.format(word=word, noun=noun_phrase(word), background=noun_phrase(f"{word} background"))
        examples.append(Example(prompt, prompt, anchor))
    return Concept(name=text, kind=kind, words=(word,), examples=tuple(examples), sensitive=sensitive(text))


def _told(text: str) -> tuple[Kind, str]:
    """Return ("style", "neon") for "neon style": the kind that the text tells, and what is left of it."""
    for kind, pattern in WORDED:
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            return kind, match["word"]
    for kind, file in LISTED:
        if any(same(text, name) for name in _names(FOLDER / file)):
            return kind, text
    return "object", text


@cache
def _names(path: Path) -> tuple[str, ...]:
    """Return the names of a list, of which a line has several for one person; none without the list."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return tuple(filter(None, map(str.strip, re.split("[,\n]", text))))


def _from_file(path: Path, kind: Kind | Literal["auto"]) -> Concept:
    """Read a concept file, whose fields prompts/README.md lists."""
    try:
        concept = _of_fields(path, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a concept file ({error!r}): compare it with nudity.json") from error
    if concept.kind not in TEMPLATES or not concept.words or not concept.examples:
        raise ValueError(f"{path}: needs a kind out of {', '.join(TEMPLATES)}, words and examples")
    if kind not in ("auto", concept.kind):
        raise ValueError(f"{path} says that {concept.name} is of kind {concept.kind}, not {kind}: leave the kind out")
    return concept


def _of_fields(path: Path, fields: dict[str, Any]) -> Concept:
    """Return the concept of a parsed file. Raises KeyError, TypeError and ValueError for one that is none."""
    examples = []
    for example in fields["examples"]:
        examples.append(Example(**{"caption": example["prompt"]} | example))
    evaluation = []
    for asked in fields.get("evaluation", []):
        evaluation.append(Example(asked["prompt"], asked["prompt"], "", asked.get("seed")))
    for text in (*(text for example in examples for text in example[:3]), *_texts(fields, "words")):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{text!r} is no text")
    return Concept(
        name=path.stem,
        kind=fields["kind"],
        words=_texts(fields, "words"),
        examples=tuple(examples),
        aliases=_texts(fields, "aliases"),
        evaluation=tuple(evaluation),
        retain=_texts(fields, "retain"),
        sensitive=bool(fields.get("sensitive", False)),
        file=path.name,
    )


def _texts(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts of a concept file, () where it has none. Raises TypeError for anything else."""
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name} is no list of texts")
    return tuple(value)


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
