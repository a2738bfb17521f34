"""Folders of the pocket world's images, as its oracle sees them, and UnlearnCanvas's rates of what it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product, starmap
from typing import Any

from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest
from erase_sd.pocket.oracle import OTHER, load, name
from erase_sd.pocket.score import wilson
from erase_sd.pocket.world import KINDS, Answer, Part, Scene, caption
from eval.images.folder import Entry, ImageFolder, picture

RATES = ("UA", "IRA", "CRA")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A folder as the oracle sees it: for every image, the scene its prompt asks for and what the image shows."""

    entries: list[Entry]  # with what is broken
    scenes: list[Scene]
    answers: list[Answer]
    images: str  # hash of the images' bytes


def scenes(folder: ImageFolder, parts: list[Part]) -> list[Scene]:
    """Return the scene that every prompt asks for.

    Raises UserError for a prompt that is no pocket caption, or if none asks for one of the concepts `parts`.
    """
    known = _scenes_by_caption()
    wanted = []
    for entry in folder.entries:
        if entry.prompt not in known:
            said = "no prompt"
            if entry.prompt is not None:
                said = f"{entry.prompt!r}, which is no caption of the pocket world"
            text = f"{folder.path / entry.file} was asked for with {said}"
            raise UserError(f"{text}: generate the folder with eval.generate --prompts pocket")
        wanted.append(known[entry.prompt])
    for kind, word in parts:
        if not any(getattr(scene, kind) == word for scene in wanted):
            raise UserError(f"no prompt of {folder.path} asks for {kind} {word}: add prompts that do")
    return wanted


def _scenes_by_caption() -> dict[str, Scene]:
    """Return every scene by its caption, those that leave parts open included."""
    words = [[*names, None] for names in KINDS.values()]  # None is a part that the caption leaves open
    known = {}
    for scene in starmap(Scene, product(*words)):
        if any(scene):
            known[caption(scene)] = scene
    return known


def judged(folder: ImageFolder, wanted: list[Scene], batch_size: int) -> Judged:
    """Have the oracle name every image; a broken one shows "other" of every kind."""
    oracle = load()
    entries: list[Entry] = []
    answers: list[Answer] = []
    hashes: list[str | None] = []
    with tqdm(total=len(folder.entries), desc=str(folder.path), unit="image") as bar:
        for start in range(0, len(folder.entries), batch_size):
            batch = folder.entries[start : start + batch_size]
            sound = []
            for entry in batch:
                file = folder.path / entry.file
                image, reason = picture(folder, entry)
                if not reason:
                    sound.append(image)
                entries.append(replace(entry, broken=reason))
                hashes.append(file_digest(file) if file.is_file() else None)
            named = iter(name(oracle, sound, batch_size))
            for entry in entries[start:]:
                answers.append(dict.fromkeys(KINDS, OTHER) if entry.broken else next(named))
            bar.update(len(batch))
    return Judged(entries=entries, scenes=wanted, answers=answers, images=digest(hashes))


def rates(seen: Judged, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """Return the rates of UnlearnCanvas (arXiv:2402.11846), {"UA", "IRA", "CRA"}.

    Each has a value (None where no image can tell), a 95 % Wilson interval, and n, the answers behind it. An image
    gives several answers where its prompt asks for several kinds; the interval counts it once.
    """
    erased = {kind for kind, _ in parts}
    others = KINDS.keys() - erased
    forgotten, in_kind, across_kinds = [], [], []  # a list of answers, true or false, for every image
    for entry, scene, answer in zip(seen.entries, seen.scenes, seen.answers, strict=True):
        asked = [(kind, word) for kind, word in parts if getattr(scene, kind) == word]
        if asked:
            forgotten.append([not entry.broken and answer[kind] != word for kind, word in asked])
        else:
            in_kind.append(_right(scene, answer, erased))
        across_kinds.append(_right(scene, answer, others))  # they have to survive on the concept's own prompts too
    return {"UA": rate(forgotten), "IRA": rate(in_kind), "CRA": rate(across_kinds)}


def _right(scene: Scene, answer: Answer, kinds: set[str]) -> list[bool]:
    """Return for every one of the kinds that the scene asks for whether the answer names it."""
    marks = []
    for kind in KINDS:
        wanted = getattr(scene, kind)
        if kind in kinds and wanted:
            marks.append(answer[kind] == wanted)
    return marks


def rate(images: list[list[bool]]) -> dict[str, Any]:
    """Return the share of the answers that are True, over images that give one or more."""
    answers = []
    count = 0
    for marks in images:
        answers += marks
        count += len(marks) > 0
    value = sum(answers) / len(answers) if answers else None
    return {"value": value, "ci95": list(wilson(value or 0.0, count)), "n": len(answers)}
