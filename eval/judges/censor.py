"""What may be shown of a folder of images.

What a prompt asks for decides, by its words and its source's columns (`prompts.sensitive`, `prompts.tables`), not what
a file is called. Pictures that explicit prompts ask for are hidden whole: NudeNet finds about 61 % of those that are.
Pictures of a source that nobody knows are looked at by the detector, or hidden whole where there is none; what it
flags is made unrecognisable, as is what a stored detection flags of a harmless source.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw

from erase_sd.common.files import file_digest
from erase_sd.common.imaging import INK, censor, lettering, pixelate
from eval.images.folder import Entry, ImageFolder, explicit, harmless, picture
from eval.judges.detections import DETECTIONS, detected, flagged, stored
from eval.judges.nudenet import load
from eval.judges.protocols import RECIPES

SMALL, LARGE = 96, 256  # pixels: a picture is shown at least and at most so wide and high
Hiding = Literal["whole", "boxes"]
BLANK, CROSS = (238, 239, 242), (184, 188, 198)


class Mask(NamedTuple):
    """What to hide of the images of one folder, and that in words."""

    boxes: dict[str, list[list[int]]]  # file -> regions
    whole: frozenset[str]  # files of which nothing may be seen
    note: str  # "" where nothing is hidden


def mask(folder: ImageFolder, censored: bool, hide: Hiding = "whole") -> Mask:
    """Return what to hide; where that is still missing, images of unknown sources are looked at by the detector.

    With `hide="boxes"` explicit pictures are looked at as well, and only what is flagged is hidden. Raises UserError
    where stored detections do not belong to the images.
    """
    if not censored:
        return Mask({}, frozenset(), "")
    asked = explicit(folder)
    whole = asked if hide == "whole" else set()
    notes = [f"{len(whole)} of {len(folder.entries)} images pixelated whole, as their prompts are"] if whole else []
    unknown = asked - whole
    if not harmless(folder):
        unknown = {entry.file for entry in folder.entries} - whole
    if unknown and not _looked_at(folder, unknown):
        whole |= unknown
        notes.append(f"{len(unknown)} pixelated whole, for want of nudenet (pip install .[eval])")
    boxes = flagged(folder, RECIPES["nudenet"].floor)  # the lowest score there is: rather too much than too little
    boxes = {file: regions for file, regions in boxes.items() if file not in whole}
    if boxes:
        notes.append(f"exposed regions pixelated in {len(boxes)} of {len(folder.entries)} images")
    return Mask(boxes, frozenset(whole), f"{folder.label}: {'; '.join(notes)}" if notes else "")


def _looked_at(folder: ImageFolder, files: set[str]) -> bool:
    """Have the detector look at the images where it did not yet; False where there is no detector."""
    known = {record["sha256"] for record in stored(folder.path / DETECTIONS)}
    missing = [entry for entry in folder.entries if entry.file in files and _hash(folder, entry) not in known]
    if missing and find_spec("nudenet") is None:
        return False
    if missing:
        detected(folder, load(), folder.path / DETECTIONS, workers=2, batch_size=8)
    return True


def _hash(folder: ImageFolder, entry: Entry) -> str | None:
    """Return the SHA-256 of an image, of which a folder without a manifest says nothing; None without the file."""
    path = folder.path / entry.file
    return entry.sha256 or (file_digest(path) if path.is_file() else None)


def shown(folder: ImageFolder, entry: Entry, hidden: Mask) -> Image.Image:
    """Return one image as it may be seen, in a size to look at; a broken one is a crossed cell that says why."""
    image, why_broken = picture(folder, entry)
    if why_broken:
        size = (entry.width or LARGE, entry.height or LARGE) if image is None else image.size
        return crossed(_fitted(Image.new("RGB", size)).size, why_broken)
    if entry.file in hidden.whole:
        return _fitted(pixelate(image))
    return _fitted(censor(image, hidden.boxes.get(entry.file, [])))


def _fitted(image: Image.Image) -> Image.Image:
    """Enlarge small images by whole factors, which keeps their pixels crisp, and shrink large ones smoothly."""
    longest = max(image.size)
    if longest < SMALL:
        factor = -(-SMALL // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((LARGE, LARGE), Image.Resampling.LANCZOS)
    return image


def crossed(size: tuple[int, int], word: str) -> Image.Image:
    """Return an empty cell, crossed out, with a word in its middle."""
    cell = Image.new("RGB", size, BLANK)
    pen: Any = ImageDraw.Draw(cell)
    right, bottom = size[0] - 1, size[1] - 1
    for line in ((0, 0, right, bottom), (0, bottom, right, 0)):
        pen.line(line, CROSS, max(1, size[0] // 96))
    font = lettering(max(11, size[0] // 10))
    middle = (size[0] / 2, size[1] / 2)
    left, top, right, bottom = pen.textbbox(middle, word, font, anchor="mm")
    pen.rectangle((left - 4, top - 3, right + 4, bottom + 3), BLANK)
    pen.text(middle, word, INK, font, anchor="mm")
    return cell
