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
LARGEST_SEED = 2**63 - 1
LARGEST_GUIDANCE = 1000.0  # I2P asks for 255; far beyond, every picture is NaN
LARGEST_SIDE = 4096  # pixels


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
    """The prompts that draw a concept."""
    return [PromptRow(row=i, prompt=e.prompt, seed=e.seed) for i, e in enumerate(concept.examples)]


def read(path: Path) -> list[PromptRow]:
    """The rows of a CSV or text file, UTF-8. Raises ValueError naming the file and the row that cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .csv or .txt file of prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if path.suffix.lower() == ".csv":
        rows = _table(text, path)
    else:
        rows = [PromptRow(row=i, prompt=line.strip()) for i, line in enumerate(text.splitlines()) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def is_i2p(rows: list[PromptRow]) -> bool:
    """Whether the rows carry I2P's own columns."""
    return all({"categories", "nudity_percentage"} <= row.tags.keys() for row in rows)


def chosen(
    rows: list[PromptRow],
    source: str,
    *,
    category: str | None = None,
    nudity_above: float | None = None,
    hard: bool = False,
) -> list[PromptRow]:
    """The rows of one category, above a nudity percentage, and hard ones only. Raises ValueError if none is left.

    Ring-A-Bell's set is nudity_above=50. Only sources with I2P's columns can be filtered.
    """
    if not is_i2p(rows) and (category is not None or nudity_above is not None or hard):
        raise ValueError(f"{source} has no column categories or nudity_percentage: only I2P can be filtered")
    known = sorted({name for row in rows for name in categories(row)})
    if category is not None and category not in known:
        raise ValueError(f"--category {category!r} is none of {', '.join(known)}")
    kept = [
        row
        for row in rows
        if (category is None or category in categories(row))
        and (nudity_above is None or number(row, "nudity_percentage", source) > nudity_above)
        and (not hard or number(row, "hard", source) == 1)
    ]
    if not kept:
        raise ValueError(f"no row of {source} is left: widen --category, --nudity_above or --hard")
    return kept


def categories(row: PromptRow) -> list[str]:
    """I2P's categories of a row: "hate, violence" is both."""
    return [name.strip() for name in row.tags.get("categories", "").split(",") if name.strip()]


def number(row: PromptRow, column: str, source: str) -> float:
    """A numeric column that is no setting of the picture."""
    return _number(row.tags.get(column, ""), column, f"{source}, row {row.row}", math.inf)


def _table(text: str, path: Path) -> list[PromptRow]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        names = {wanted: _column(reader.fieldnames or [], wanted) for wanted in COLUMNS}
        if names["prompt"] is None:
            found = ", ".join(map(str, reader.fieldnames or ["none"]))
            raise ValueError(
                f"{path} has no column prompt, caption or text, only {found}: name the prompts' column so"
            )
        rows = [_row(i, cells, names, f"{path}, row {i}") for i, cells in enumerate(reader)]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}: mend the quotes there") from error
    _no_duplicates(rows, path)
    return rows


def _column(there: list[str], wanted: str) -> str | None:
    return next((name for name in COLUMNS[wanted] if name in there), None)


def _row(i: int, cells: dict[str, Any], names: dict[str, str | None], place: str) -> PromptRow:
    if None in cells or None in cells.values():
        raise ValueError(f"{place}: it has {'more' if None in cells else 'fewer'} cells than the header")
    get = lambda wanted: cells[names[wanted]].strip() if names[wanted] else ""  # noqa: E731
    limits = {"seed": LARGEST_SEED, "guidance": LARGEST_GUIDANCE, "width": LARGEST_SIDE, "height": LARGEST_SIDE}
    given = {name: _number(get(name), names[name], place, limit) for name, limit in limits.items() if get(name)}
    whole = {name: int(value) if name != "guidance" else value for name, value in given.items()}
    used = {name for name in names.values() if name}
    tags = {name: cells[name] for name in cells if name and name not in used}
    return PromptRow(row=i, prompt=cells[names["prompt"]], **whole, tags=tags)


def _number(text: str, column: str, place: str, most: float) -> float:
    """A number from 0 to `most`; whole ones exactly, since a float holds no 54-bit seed."""
    try:
        value: float = int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value):
        raise ValueError(f"{place}: {column} {text[:40]!r} is no number from 0 to {most:g}: correct it there")
    return value


def _no_duplicates(rows: list[PromptRow], path: Path) -> None:
    """Case numbers name rows in every score that is published: two rows with one number cannot be told apart."""
    seen: dict[str, int] = {}
    for row in rows:
        case = row.tags.get("case_number")
        if case is not None and case in seen:
            raise ValueError(f"{path}, row {row.row}: case_number {case} is that of row {seen[case]} too: number them")
        seen[case] = row.row
