"""A look at what was flagged: sheets of numbered boxes, a table to write verdicts into, and the counts that are left.

Detectors err: of nine I2P images that the paper found flagged, seven were false. The folder `review/` holds

    sheet-001.png ...    every flagged box with its surroundings, in red, its region unrecognisable unless uncensored
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
    """What tells one box from all others; a picture that is drawn anew has boxes that nobody has judged."""
    return record["sha256"], found["class"], tuple(found["box"])


def verdicts(folder: Path) -> dict[Key, bool]:
    """The boxes that somebody judged. Raises UserError naming the line that cannot be read."""
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
    """The counts without the boxes judged false, and how far the review is; None where no verdict was ever written.

    {"boxes", "true", "false", "open", "protocols": {name: {"counts", "total"}}}
    """
    if not (judged := verdicts(folder)):
        return None
    seen = [judged.get(key(record, found)) for record, found in flagged_by(records, rules, {})]
    kinds = Counter(seen)
    rest = [
        record | {"detections": [d for d in record["detections"] if judged.get(key(record, d)) is not False]}
        for record in records
    ]
    numbers = {"boxes": len(seen), "true": kinds[True], "false": kinds[False], "open": kinds[None]}
    return numbers | {"protocols": {name: count(rest, rule) for name, rule in rules.items()}}


def flagged_by(
    records: list[DetectionRecord], rules: dict[str, Protocol], judged: dict[Key, bool]
) -> list[tuple[DetectionRecord, dict[str, Any]]]:
    """Every box that one of the rules counts, or that has a verdict already, in the order of the images."""
    return [
        (record, found)
        for record in records
        for found in record["detections"]
        if key(record, found) in judged or any(rule.counts(found) for rule in rules.values())
    ]


def write(
    images: ImageFolder, records: list[DetectionRecord], rules: dict[str, Protocol], folder: Path, censored: bool
) -> int:
    """Write the sheets and the table, keeping the verdicts that are in it; returns the number of boxes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / ".gitignore", "*\n")
    judged = verdicts(folder)
    boxes = flagged_by(records, rules, judged)
    entries = {entry.file: entry for entry in images.entries}
    for old in folder.glob("sheet-*.png"):
        old.unlink()
    for start in range(0, len(boxes), ACROSS * DOWN):
        page = boxes[start : start + ACROSS * DOWN]
        cells = [
            _cell(n, images, entries[r["file"]], r, d, censored) for n, (r, d) in enumerate(page, start=start + 1)
        ]
        rows = [cells[i : i + ACROSS] for i in range(0, len(cells), ACROSS)]
        data = io.BytesIO()
        sheet(rows).save(data, "PNG")
        write_atomic(folder / _sheet(start), data.getvalue())
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for index, (record, found) in enumerate(boxes):
        where, score = key(record, found), f"{found['score']:.4f}"
        verdict = str(judged[where]).lower() if where in judged else ""
        row = (index + 1, record["file"], found["class"], score, *found["box"], record["sha256"], verdict)
        table.writerow((_sheet(index), *row))
    write_atomic(folder / VERDICTS, text.getvalue())
    return len(boxes)


def _sheet(index: int) -> str:
    return f"sheet-{index // (ACROSS * DOWN) + 1:03}.png"


def _cell(
    number: int, images: ImageFolder, entry: Entry, record: DetectionRecord, found: dict[str, Any], censored: bool
) -> Image.Image:
    """One box in the middle of its surroundings, half its size on every side, with its number, class and score."""
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
