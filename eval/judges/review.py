"""A look at what was flagged: sheets of numbered boxes, a table to write verdicts into, and the counts that are left.

Detectors err: of nine I2P images that the paper found flagged, seven were false. The folder `review/` holds

    sheet-001.png ...    every flagged box with its surroundings, in red, unrecognisable inside unless uncensored
    verdicts.csv         one row a box; write true or false into `verdict` and give the command again

It is closed to other users and says to git that it is none of its business.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from erase_sd.common.imaging import INK, PAPER, censor, sheet
from eval.images.folder import Entry, ImageFolder, picture
from eval.judges.protocols import EXPOSED, DetectionRecord, Protocol, count

VERDICTS = "verdicts.csv"
COLUMNS = ("sheet", "number", "file", "class", "score", "x", "y", "width", "height", "sha256", "verdict")
WORDS = {"": None, "true": True, "false": False}
CELL, ACROSS, DOWN = 160, 8, 5  # pixels a side of one box's picture, pictures in a row, rows of a sheet

Key = tuple[str, str, tuple[int, ...]]  # sha256 of the image, class, box


def key(record: DetectionRecord, found: dict[str, Any]) -> Key:
    """Return what tells one box from all others; an image that was generated anew has boxes without a verdict."""
    return record["sha256"], found["class"], tuple(found["box"])


def verdicts(folder: Path) -> dict[Key, bool]:
    """Return the boxes that have a verdict. Raises UserError naming the line that cannot be read."""
    file = folder / VERDICTS
    if not file.is_file():
        return {}
    judged = {}
    with open(file, encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                box = tuple(int(row[name]) for name in ("x", "y", "width", "height"))
                verdict, where = WORDS[row["verdict"].strip().lower()], (row["sha256"], row["class"], box)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                text = "write true, false or nothing into the column verdict and save it as comma-separated values"
                raise UserError(f"{file}, line {number} is no verdict ({error}): {text}") from error
            if verdict is not None:
                judged[where] = verdict
    return judged


def reviewed(records: list[DetectionRecord], rules: dict[str, Protocol], folder: Path) -> dict[str, Any] | None:
    """Return the counts without the boxes marked false, and how far the review is.

    {"boxes", "true", "false", "open", "protocols": {name: {"counts", "total"}}}, None where no verdict was written.
    """
    judged = verdicts(folder)
    if not judged:
        return None
    marks = Counter(judged.get(key(record, found)) for record, found in flagged_by(records, rules, {}))
    rest = [_without_false(record, judged) for record in records]
    return {
        "boxes": marks.total(),
        "true": marks[True],
        "false": marks[False],
        "open": marks[None],
        "protocols": {name: count(rest, rule) for name, rule in rules.items()},
    }


def _without_false(record: DetectionRecord, judged: dict[Key, bool]) -> DetectionRecord:
    """Return the record without the boxes that were marked false."""
    left = [found for found in record["detections"] if judged.get(key(record, found)) is not False]
    return record | {"detections": left}


def flagged_by(
    records: list[DetectionRecord], rules: dict[str, Protocol], judged: dict[Key, bool]
) -> list[tuple[DetectionRecord, dict[str, Any]]]:
    """Return every box that one of the rules counts, or that has a verdict already, in the order of the images."""
    boxes = []
    for record in records:
        for found in record["detections"]:
            if key(record, found) in judged or any(rule.counts(found) for rule in rules.values()):
                boxes.append((record, found))
    return boxes


def write(
    images: ImageFolder, records: list[DetectionRecord], rules: dict[str, Protocol], folder: Path, censored: bool
) -> int:
    """Write the sheets and the table, keeping the verdicts that are in it; returns the number of boxes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / ".gitignore", "*\n")
    judged = verdicts(folder)
    boxes = flagged_by(records, rules, judged)
    for old in folder.glob("sheet-*.png"):
        old.unlink()
    entries = {entry.file: entry for entry in images.entries}
    cells = []
    for number, (record, found) in enumerate(boxes, start=1):
        cells.append(_cell(number, images, entries[record["file"]], record, found, censored))
        if len(cells) == ACROSS * DOWN or number == len(boxes):
            _write_sheet(folder / _sheet(number - 1), cells)
            cells = []
    _write_table(folder / VERDICTS, boxes, judged)
    return len(boxes)


def _write_sheet(file: Path, cells: list[Image.Image]) -> None:
    rows = [cells[start : start + ACROSS] for start in range(0, len(cells), ACROSS)]
    data = io.BytesIO()
    sheet(rows).save(data, "PNG")
    write_atomic(file, data.getvalue())


def _write_table(file: Path, boxes: list[tuple[DetectionRecord, dict[str, Any]]], judged: dict[Key, bool]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for index, (record, found) in enumerate(boxes):
        verdict = judged.get(key(record, found))
        word = "" if verdict is None else str(verdict).lower()
        score = f"{found['score']:.4f}"
        row = (index + 1, record["file"], found["class"], score, *found["box"], record["sha256"], word)
        table.writerow((_sheet(index), *row))
    write_atomic(file, text.getvalue())


def _sheet(index: int) -> str:
    return f"sheet-{index // (ACROSS * DOWN) + 1:03}.png"


def _cell(
    number: int, images: ImageFolder, entry: Entry, record: DetectionRecord, found: dict[str, Any], censored: bool
) -> Image.Image:
    """Return one box with half its size of surroundings on every side, and its number, class and score above."""
    image = picture(images, entry)[0]
    if image is None:
        raise UserError(
            f"{images.path / entry.file} is gone since it was detected: run the same command without --review"
        )
    if censored:  # all that is exposed, not only this box: another one may be in its surroundings
        image = censor(image, [d["box"] for d in record["detections"] if d["class"] in EXPOSED])
    x, y, w, h = found["box"]
    pen = ImageDraw.Draw(image)
    pen.rectangle((x, y, x + max(w, 1), y + max(h, 1)), outline=(255, 0, 0), width=max(1, max(w, h) // 60))
    right, bottom = min(image.width, x + w + w // 2 + 1), min(image.height, y + h + h // 2 + 1)
    part = image.crop((max(0, x - w // 2), max(0, y - h // 2), right, bottom))
    cell = Image.new("RGB", (CELL, CELL + 16), PAPER)
    cell.paste(ImageOps.pad(part, (CELL, CELL), color=PAPER), (0, 16))
    name = found["class"].removesuffix("_EXPOSED").replace("_", " ").lower()
    ImageDraw.Draw(cell).text((2, 2), f"{number}  {name}  {found['score']:.2f}", INK)
    return cell
