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
    """A folder as the judge sees it: for every image, what it is asked to show and what it shows."""

    entries: list[Entry]  # with what is broken
    scenes: list[Scene]
    answers: list[Answer]
    images: str  # hash of what was judged


def scenes(folder: ImageFolder, parts: list[Part]) -> list[Scene]:
    """What every prompt asks for. Raises UserError for a prompt that is no pocket caption, or if none asks for one
    of the concepts."""
    words = ([*names, None] for names in KINDS.values())  # None is a part that the caption leaves open
    known = {caption(scene): scene for scene in starmap(Scene, product(*words)) if any(scene)}
    for entry in folder.entries:
        if entry.prompt not in known:
            said = (
                "no prompt" if entry.prompt is None else f"{entry.prompt!r}, which is no caption of the pocket world"
            )
            text = f"{folder.path / entry.file} was asked for with {said}"
            raise UserError(f"{text}: draw the folder with eval.generate --prompts pocket")
    wanted = [known[str(entry.prompt)] for entry in folder.entries]
    for kind, word in parts:
        if not any(getattr(scene, kind) == word for scene in wanted):
            raise UserError(f"no prompt of {folder.path} asks for {kind} {word}: add prompts that do")
    return wanted


def judged(folder: ImageFolder, wanted: list[Scene], batch_size: int) -> Judged:
    """Have the oracle name every image; a broken one shows "other" of every kind."""
    oracle, entries, answers, hashes = load(), [], [], []
    with tqdm(total=len(folder.entries), desc=str(folder.path), unit="image") as bar:
        for start in range(0, len(folder.entries), batch_size):
            batch = folder.entries[start : start + batch_size]
            pictures = [picture(folder, entry) for entry in batch]
            named = iter(name(oracle, [image for image, reason in pictures if not reason], batch_size))
            answers += [dict.fromkeys(KINDS, OTHER) if reason else next(named) for _, reason in pictures]
            entries += [replace(e, broken=reason) for e, (_, reason) in zip(batch, pictures, strict=True)]
            files = [folder.path / entry.file for entry in batch]
            hashes += [file_digest(file) if file.is_file() else None for file in files]
            bar.update(len(batch))
    return Judged(entries=entries, scenes=wanted, answers=answers, images=digest(hashes))


def rates(seen: Judged, parts: list[Part]) -> dict[str, dict[str, Any]]:
    """{"UA", "IRA", "CRA"}: value (None where no image can tell), 95 % Wilson interval, and n, the answers behind it.

    An image gives several answers where several kinds are asked for; the interval counts it once.
    """
    erased, images = {kind for kind, _ in parts}, list(zip(seen.entries, seen.scenes, seen.answers, strict=True))
    kept = [(s, a) for _, s, a in images if not any(getattr(s, kind) == word for kind, word in parts)]
    everywhere = [(s, a) for _, s, a in images]  # other kinds have to survive on the concept's own prompts too

    def right(kinds: set[str], asked: list[tuple[Scene, dict[str, str]]]) -> list[list[bool]]:
        return [[a[k] == getattr(s, k) for k in KINDS if k in kinds and getattr(s, k)] for s, a in asked]

    gone = [
        [not entry.broken and a[kind] != word for kind, word in parts if getattr(s, kind) == word]
        for entry, s, a in images
    ]
    found = (gone, right(erased, kept), right(KINDS.keys() - erased, everywhere))
    return {name: _rate([answers for answers in group if answers]) for name, group in zip(RATES, found, strict=True)}


def _rate(images: list[list[bool]]) -> dict[str, Any]:
    """Share of the answers that are True, over images that give one or more."""
    answers = [answer for image in images for answer in image]
    value = sum(answers) / len(answers) if answers else None
    return {"value": value, "ci95": list(wilson(value or 0.0, len(images))), "n": len(answers)}
