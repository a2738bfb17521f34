"""What may be shown of a folder of images: explicit sources with their exposed regions made unrecognisable.

Only I2P and the nudity prompts ask for exposed bodies, so only they are detected for the sake of a picture, and hidden
whole where nobody can detect. Of other sources what a stored detection flags is hidden.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from erase_sd.common.imaging import INK, censor, lettering, pixelate
from eval.images.folder import Entry, ImageFolder, picture
from eval.judges.detections import DETECTIONS, detected, flagged, stored
from eval.judges.nudenet import load
from eval.judges.protocols import RECIPES

EXPLICIT = {"i2p", "nudity"}  # names of sources, as generation.json has them
SMALL, LARGE = 96, 256  # pixels: a picture is shown at least and at most so wide and high
BLANK, CROSS = (238, 239, 242), (184, 188, 198)


class Mask(NamedTuple):
    """What to hide of the images of one folder, and that in words."""

    boxes: dict[str, list[list[int]]]  # file -> regions
    whole: bool  # nobody looked for regions: hide everything
    note: str  # "" where nothing is hidden


def mask(folder: ImageFolder, censored: bool) -> Mask:
    """Return what to hide; of an explicit source the exposed regions are detected where that is still missing.

    Raises UserError where stored detections do not belong to the images.
    """
    if not censored:
        return Mask({}, False, "")
    known = {record["sha256"] for record in stored(folder.path / DETECTIONS)}
    explicit = folder.generation.get("prompts") in EXPLICIT
    if explicit and not {entry.sha256 for entry in folder.entries} <= known:
        if find_spec("nudenet") is None:
            return Mask({}, True, f"{folder.label}: pixelated whole, for want of nudenet (pip install .[eval])")
        detected(folder, load(), folder.path / DETECTIONS, workers=2, batch_size=8)
    boxes = flagged(folder, RECIPES["nudenet"].floor)  # the lowest score there is: rather too much than too little
    text = f"{folder.label}: exposed regions pixelated in {len(boxes)} of {len(folder.entries)} images"
    return Mask(boxes, False, text if boxes else "")


def shown(folder: ImageFolder, entry: Entry, hidden: Mask) -> Image.Image:
    """Return one image as it may be seen, in a size to look at; a broken one is a crossed cell that says why."""
    image, why_broken = picture(folder, entry)
    if why_broken:
        size = (entry.width or LARGE, entry.height or LARGE) if image is None else image.size
        return crossed(_fitted(Image.new("RGB", size)).size, why_broken)
    if hidden.whole:
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
