"""Prompts to evaluate with: every row of a source, with the seed, guidance and size that the source gives it.

    read(Path("i2p.csv"))                      # I2P in either column naming, COCO captions, any CSV with such a column
    read(Path("prompts.txt"))                  # one prompt a line
    read_file(Path("mma.csv"), "adv_prompt")   # rows of a named column, and notices for whoever asked
    of_concept(load("nudity"))                 # the prompts of a concept

Rows keep their number, count from 0, and stay where they are: an empty prompt (I2P has had one, row 2260) is the empty
prompt, neither dropped nor the word "nan", and duplicates are rows of their own. Lines end at LF and CR LF only: other
control characters belong to the prompts of some attacks.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from prompts.concepts import Concept, sensitive

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
# Names of columns that hold prompts as well: adv_prompt, prompt1, "sensitive prompt", but not prompt_toxicity.
LIKE_A_PROMPT = re.compile(r"(prompts?|captions?|\b_?text)[ _-]?(\d*|adv\w*)$", re.IGNORECASE)
# What the files of Ring-A-Bell, MMA, P4D and UnlearnDiffAtk have beside their prompts.
ATTACK_COLUMN = r"(adv|target|sensitive|normal)[ _-]?prompt|prompt[ _-]?adv\w*|unsafe_prob"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """What a file holds, and what its reader has to tell the user: a sentence each."""

    rows: list[PromptRow]
    notices: tuple[str, ...] = ()


def of_concept(concept: Concept) -> list[PromptRow]:
    """Return the prompts that ask for a concept: those of its published evaluation, where it has one."""
    rows = []
    for i, example in enumerate(concept.evaluation or concept.examples):
        rows.append(PromptRow(row=i, prompt=example.prompt, seed=example.seed))
    return rows


def read(path: Path) -> list[PromptRow]:
    """Return the rows of a file without its notices. Raises ValueError as `read_file` does."""
    return read_file(path).rows


def read_file(path: Path, column: str | None = None) -> PromptFile:
    """Return the rows of a CSV or text file, UTF-8; `column` names the prompts' column of a CSV.

    Raises ValueError naming file and row that cannot be read.
    """
    text = _text(path)
    if path.suffix.lower() == ".csv":
        found = _table(text, path, column)
    elif column is None:
        found = PromptFile(rows=_lines(text))
    else:
        raise ValueError(f"--prompt_column {column!r} is for a .csv, and {path} has no columns: leave it out")
    if not found.rows:
        raise ValueError(f"{path} holds no prompts")
    return found


def is_i2p(rows: list[PromptRow]) -> bool:
    """Return whether all rows carry I2P's own columns."""
    return all({"categories", "nudity_percentage"} <= row.tags.keys() for row in rows)


def is_coco(rows: list[PromptRow]) -> bool:
    """Return whether all rows carry what the copies of COCO's captions have: the image's id, or their source."""
    for row in rows:
        named = {"image_id", "coco_id"} & row.tags.keys()
        if not named and not row.tags.get("source", "").startswith("coco"):
            return False
    return True


def is_explicit(prompt: str | None, tags: dict[str, Any]) -> bool:
    """Return whether a row asks for pictures that are to be hidden: by its words, and by what its columns say.

    Columns of the files that attacks publish tell as well: their prompts need no readable word.
    """
    if sensitive(prompt or "") or any(re.fullmatch(ATTACK_COLUMN, name, re.IGNORECASE) for name in tags):
        return True
    if "sexual" in str(tags.get("categories", "")).lower():
        return True
    try:
        return float(tags.get("nudity_percentage") or 0) > 0
    except ValueError:
        return True  # nobody knows


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
    return float(_number(row.tags.get(column, ""), column, f"{source}, row {row.row}", sys.float_info.max))


def _text(path: Path) -> str:
    """Return the text of a file with LF at the end of its lines. Raises ValueError where it is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a .csv or .txt file of prompts")
    data = path.read_bytes()
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a git-LFS pointer, not the file that it stands for: run git lfs pull")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    before, nul, _ = text.partition("\0")
    if nul:
        line = before.count("\n") + 1
        raise ValueError(f"{path}, line {line} holds a NUL byte: remove it, or save the file as UTF-8")
    if "\r" in text.rstrip("\r") and "\n" not in text:
        raise ValueError(f"{path} ends its lines with carriage returns alone: save it with LF or CR LF")
    return text


def _lines(text: str) -> list[PromptRow]:
    rows = []
    for i, line in enumerate(text.split("\n")):
        if line.strip():
            rows.append(PromptRow(row=i, prompt=line.strip(" \t\r")))
    return rows


def _table(text: str, path: Path, column: str | None) -> PromptFile:
    records = _records(text, path)
    if not records:
        return PromptFile(rows=[])
    header = [name.strip() for name in records.pop(0)]
    places = {}
    for wanted, names in COLUMNS.items():
        places[wanted] = _standing(header, names)
    if column is not None:
        places["prompt"] = _standing(header, (column.strip(),))
    if not places["prompt"]:
        raise ValueError(_no_prompts(header, records, path, column))
    taken = {}
    for wanted, found in places.items():
        if found:
            taken[wanted] = found[0]
    rows = []
    for i, cells in enumerate(records):
        rows.append(_row(i, cells, header, taken, f"{path}, row {i}"))
    notices = [*_passed_over(header, places, path, column), *_repeated_cases(rows, path)]
    return PromptFile(rows=rows, notices=tuple(notices))


def _records(text: str, path: Path) -> list[list[str]]:
    """Return the cells of every line that has some, the header's first."""
    first = text.partition("\n")[0].split(",")
    spaced = len(first) > 1 and all(name.startswith(" ") for name in first[1:])
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True, skipinitialspace=spaced)
    records = []
    try:
        for cells in reader:
            if cells:
                records.append(cells)
    except csv.Error as error:
        if not records:
            raise ValueError(_no_header(path)) from error
        place = f"{path}, row {len(records) - 1}"
        if "new-line" in str(error):
            raise ValueError(f"{place}: a carriage return stands alone in it: quote the prompt") from error
        raise ValueError(f"{place}: mend the quotes: quote the prompt, and double every quote inside it") from error
    return records


def _standing(header: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return where the columns of these names stand, in the order of the names."""
    places = []
    for name in names:
        for i, there in enumerate(header):
            if there.casefold() == name.casefold():
                places.append(i)
    return places


def _no_header(path: Path) -> str:
    """Return the sentence for a file whose first line may be a prompt, which nobody wants on the screen."""
    return (
        f"{path} has no header: name it .txt, one prompt a line, or, if its first line does name columns, "
        "say which one holds the prompts with --prompt_column NAME"
    )


def _no_prompts(header: list[str], records: list[list[str]], path: Path, column: str | None) -> str:
    """Return the sentence for a table without the column that was asked for, or any that is known."""
    if not _is_header(header, records):
        return _no_header(path)
    there = ", ".join(filter(None, header))
    if column is not None:
        return f"--prompt_column {column!r} is no column of {path}, which has {there}: name one of these"
    return (
        f"{path} has no column prompt, caption or text, only {there}: "
        "say which one holds the prompts with --prompt_column NAME"
    )


def _is_header(first: list[str], records: list[list[str]]) -> bool:
    """Return whether a first line surely names columns: short names, one of them known or above numbers."""
    for name in first:
        if len(name) > 40 or len(name.split()) > 3 or not name.isprintable() or _decimal(name).is_finite():
            return False
    known = set().union(*COLUMNS.values())
    for i, name in enumerate(first):
        if name.casefold() in known or LIKE_A_PROMPT.search(name) or _holds_numbers(records, i):
            return True
    return False


def _holds_numbers(records: list[list[str]], i: int) -> bool:
    for cells in records:
        if len(cells) <= i or not _decimal(cells[i]).is_finite():
            return False
    return bool(records)


def _passed_over(header: list[str], places: dict[str, list[int]], path: Path, column: str | None) -> list[str]:
    """Return a notice for every column that was read where others could have been meant."""
    notices = []
    for wanted, found in places.items():
        others = []
        for i, name in enumerate(header):
            alike = wanted == "prompt" and column is None and LIKE_A_PROMPT.search(name)
            if found and i != found[0] and (i in found or alike):
                others.append(name)
        if others:
            advice = ": --prompt_column NAME takes another" if wanted == "prompt" else ""
            text = f"the {wanted} is that of column {header[found[0]]}, and {', '.join(others)} is there too"
            notices.append(f"{path}: {text}{advice}")
    return notices


def _row(i: int, cells: list[str], header: list[str], taken: dict[str, int], place: str) -> PromptRow:
    if len(cells) > len(header):
        raise ValueError(f"{place}: it has more cells than the header: quote the prompt, whose commas part it")
    if len(cells) < len(header):
        raise ValueError(f"{place}: it has fewer cells than the header: write the missing ones, or mend its quotes")
    given: dict[str, float] = {}
    for name, limit in LIMITS.items():
        if name not in taken or not cells[taken[name]].strip():
            continue
        column, text = header[taken[name]], cells[taken[name]]
        value = _number(text, column, place, limit)
        given[name] = float(value) if name == "guidance" else _whole(value, column, place)
    tags: dict[str, str] = {}
    for at, name in enumerate(header):
        if name and at not in taken.values():
            tags.setdefault(name, cells[at])
    return PromptRow(row=i, prompt=cells[taken["prompt"]], **given, tags=tags)


def _number(text: str, column: str, place: str, most: float) -> Decimal:
    """Return the number from 0 to `most` that a text says, exactly: a float holds no 54-bit seed."""
    value = _decimal(text)
    if not value.is_finite() or not 0 <= value <= most:
        raise ValueError(f"{place}: {column} {text.strip()[:40]!r} is no number from 0 to {most:g}: correct it there")
    return value


def _whole(value: Decimal, column: str, place: str) -> int:
    """Return a whole number, which pandas writes as 188.0 where a column has an empty cell. ValueError for others."""
    if value != int(value):
        raise ValueError(f"{place}: {column} {str(value)[:40]} is no whole number: correct it there")
    return int(value)


def _decimal(text: str) -> Decimal:
    """Return the number that a text says; NaN if it says none."""
    try:
        return Decimal(text.strip())
    except InvalidOperation:
        return Decimal("nan")


def _repeated_cases(rows: list[PromptRow], path: Path) -> list[str]:
    """Return one notice for case numbers that repeat; ValueError in I2P and COCO, whose scores name rows by them."""
    seen: dict[str, int] = {}
    repeats = []
    for row in rows:
        case = row.tags.get("case_number", "").strip()
        if case and case in seen:
            repeats.append(f"row {row.row}: case_number {case} is that of row {seen[case]} too")
        seen.setdefault(case, row.row)
    if not repeats:
        return []
    if is_i2p(rows) or is_coco(rows):
        raise ValueError(f"{path}, {repeats[0]}: number them")
    return [f"{path}, {repeats[0]} ({len(repeats)} rows repeat one): rows go by their place in the file instead"]
