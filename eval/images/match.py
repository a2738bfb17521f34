"""Images of several folders side by side: those of the same prompt and seed, with short labels."""

from __future__ import annotations

import textwrap
from collections import Counter

from erase_sd.common.errors import UserError
from eval.images.folder import Entry, ImageFolder

PROMPT, LINE = 110, 26  # letters of a prompt, letters of a line: the sheet is for looking at images


def matched(folders: list[ImageFolder], rows: int | None) -> list[list[Entry]]:
    """Return the first `rows` images of the first folder, beside those of the same row and seed in the others.

    Images that no manifest lists are matched by their files' names. Raises UserError naming what one folder lacks.
    """
    tables = []
    for folder in folders:
        tables.append({_key(entry): entry for entry in folder.entries})
    lines = []
    for entry in folders[0].entries[:rows]:
        line = [table.get(_key(entry)) for table in tables]
        for folder, other in zip(folders, line, strict=True):
            if other is None:
                raise UserError(f"{folder.path} lacks {_words(entry)}, which {folders[0].path} has: generate it")
            if other.prompt != entry.prompt:
                raise UserError(f"{_words(entry)} is another prompt in {folder.path} than in {folders[0].path}")
        lines.append(line)
    return lines


def shared(folders: list[ImageFolder]) -> list[list[Entry]]:
    """Return the images that all folders have, line by line in the order of the first; what one lacks is left out.

    Raises UserError, as `matched` does, where they have none in common.
    """
    tables = []
    for folder in folders:
        tables.append({_key(entry): entry for entry in folder.entries})
    lines = []
    for entry in folders[0].entries:
        line = [table.get(_key(entry)) for table in tables]
        if all(other is not None and other.prompt == entry.prompt for other in line):
            lines.append(line)
    return lines or matched(folders, None)


def _key(entry: Entry) -> tuple:
    return (entry.file,) if entry.row is None else entry.noise


def _words(entry: Entry) -> str:
    return entry.file if entry.row is None else f"row {entry.row} with seed {entry.seed}"


def headings(folders: list[ImageFolder]) -> list[str]:
    """Return the folders' labels; where two are the same, the paths tell them apart."""
    count = Counter(folder.label for folder in folders)
    return [folder.label if count[folder.label] == 1 else str(folder.path) for folder in folders]


def brief(entry: Entry, letters: int = PROMPT) -> str:
    """Return an image's prompt in one line of at most `letters` characters, or its file's name if it has none."""
    if entry.prompt is None:
        return entry.file
    text = " ".join(entry.prompt.split())
    if len(text) > letters:
        return f"{text[: letters - 1]}…"
    return text or "(empty prompt)"


def label(entry: Entry) -> str:
    """Return what stands beside a row: the prompt, shortened and wrapped, and the seed; else the file's name."""
    if entry.prompt is None:
        return entry.file
    return f"{textwrap.fill(brief(entry), LINE)}\nseed {entry.seed}"
