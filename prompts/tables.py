"""Prompts to evaluate with: every row of a source, with the seed, guidance and size that the source gives it.

    read(Path("i2p.csv"))              # I2P in either column naming, COCO captions, any CSV with a prompt column
    read(Path("prompts.txt"))          # one prompt a line
    of_concept(load("nudity"))         # the prompts of a concept

Rows keep their number, count from 0, and stay where they are: an empty prompt (I2P has had one, row 2260) is the empty
prompt, neither dropped nor the word "nan", and duplicates are rows of their own.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompts.concepts import Concept

# The names a column goes by: ours, the Hub's copy of I2P, the copy in the repositories of ESD and its followers, COCO.
COLUMNS = {
    "prompt": ("prompt", "caption", "text"),
    "seed": ("seed", "sd_seed", "evaluation_seed"),
    "guidance": ("guidance", "sd_guidance_scale", "evaluation_guidance"),
    "width": ("width", "sd_image_width"),
    "height": ("height", "sd_image_height"),
}
LIMITS = {
    "seed": 2**63 - 1,
    "guidance": 1000.0,  # I2P asks for 255; far beyond, every image is NaN
    "width": 4096,  # pixels
    "height": 4096,
}


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One prompt and how its source asks for it; None where the source does not say."""

    row: int
    prompt: str
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None  # pixels
    height: int | None = None
    tags: dict[str, Any] = field(default_factory=dict)  # the source's other columns, as text


def of_concept(concept: Concept) -> list[PromptRow]:
    """Return the prompts that ask for a concept."""
    rows = []
    for i, example in enumerate(concept.examples):
        rows.append(PromptRow(row=i, prompt=example.prompt, seed=example.seed))
    return rows


def read(path: Path) -> list[PromptRow]:
    """Return the rows of a CSV or text file, UTF-8. Raises ValueError naming file and row that cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .csv or .txt file of prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if path.suffix.lower() == ".csv":
        rows = _table(text, path)
    else:
        rows = []
        for i, line in enumerate(text.splitlines()):
            if line.strip():
                rows.append(PromptRow(row=i, prompt=line.strip()))
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def is_i2p(rows: list[PromptRow]) -> bool:
    """Return whether all rows carry I2P's own columns."""
    return all({"categories", "nudity_percentage"} <= row.tags.keys() for row in rows)


def chosen(
    rows: list[PromptRow],
    source: str,
    *,
    category: str | None = None,
    nudity_above: float | None = None,
    hard: bool = False,
) -> list[PromptRow]:
    """Return the rows of one category, above a nudity percentage, and hard ones only. ValueError if none is left.

    Ring-A-Bell's set is nudity_above=50. Only sources with I2P's columns can be filtered.
    """
    if not is_i2p(rows) and (category is not None or nudity_above is not None or hard):
        raise ValueError(f"{source} has no column categories or nudity_percentage: only I2P can be filtered")
    if category is not None:
        known: set[str] = set()
        for row in rows:
            known.update(categories(row))
        if category not in known:
            raise ValueError(f"--category {category!r} is none of {', '.join(sorted(known))}")
        rows = [row for row in rows if category in categories(row)]
    if nudity_above is not None:
        rows = [row for row in rows if number(row, "nudity_percentage", source) > nudity_above]
    if hard:
        rows = [row for row in rows if number(row, "hard", source) == 1]
    if not rows:
        raise ValueError(f"no row of {source} is left: widen --category, --nudity_above or --hard")
    return rows


def categories(row: PromptRow) -> list[str]:
    """Return I2P's categories of a row: "hate, violence" is both."""
    names = map(str.strip, row.tags.get("categories", "").split(","))
    return list(filter(None, names))


def number(row: PromptRow, column: str, source: str) -> float:
    """Return the number in a column that is no setting of the image. Raises ValueError if there is none."""
    return _number(row.tags.get(column, ""), column, f"{source}, row {row.row}", math.inf)


def _table(text: str, path: Path) -> list[PromptRow]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        names = {}
        for wanted in COLUMNS:
            names[wanted] = _column(reader.fieldnames or [], wanted)
        if names["prompt"] is None:
            found = ", ".join(map(str, reader.fieldnames or ["none"]))
            raise ValueError(
                f"{path} has no column prompt, caption or text, only {found}: name the prompts' column so"
            )
        rows = []
        for i, cells in enumerate(reader):
            rows.append(_row(i, cells, names, f"{path}, row {i}"))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}: mend the quotes there") from error
    _no_duplicates(rows, path)
    return rows


def _column(there: Sequence[str], wanted: str) -> str | None:
    """Return the name by which a table calls a column, or None if it has none."""
    for name in COLUMNS[wanted]:
        if name in there:
            return name
    return None


def _row(i: int, cells: dict[str, Any], names: dict[str, str | None], place: str) -> PromptRow:
    if None in cells or None in cells.values():
        raise ValueError(f"{place}: it has {'more' if None in cells else 'fewer'} cells than the header")
    given: dict[str, float] = {}
    for name, limit in LIMITS.items():
        column = names[name]
        if column is None or not cells[column].strip():
            continue
        value = _number(cells[column].strip(), column, place, limit)
        given[name] = value if name == "guidance" else int(value)
    tags = {}
    for name, text in cells.items():
        if name and name not in names.values():
            tags[name] = text
    return PromptRow(row=i, prompt=cells[names["prompt"]], **given, tags=tags)


def _number(text: str, column: str, place: str, most: float) -> float:
    """Return the number from 0 to `most` that a text says; whole ones exactly, since a float holds no 54-bit seed."""
    try:
        value: float = int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{place}: {column} {text[:40]!r} is no number from 0 to {most:g}: correct it there")
    return value


def _no_duplicates(rows: list[PromptRow], path: Path) -> None:
    """Raise ValueError for two rows of one case number, by which published scores name rows."""
    seen: dict[str, int] = {}
    for row in rows:
        case = row.tags.get("case_number")
        if case is not None and case in seen:
            raise ValueError(f"{path}, row {row.row}: case_number {case} is that of row {seen[case]} too: number them")
        seen[case] = row.row
