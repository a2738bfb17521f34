"""The blocks that a section of the report is made of: notes, tables, galleries, sheets, pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from erase_sd.common.errors import UserError


class Note(NamedTuple):
    """A sentence, and the command that it speaks of."""

    text: str
    command: str = ""
    kind: str = "note"


class Table(NamedTuple):
    """A table; the columns after the first `words` hold numbers."""

    head: list[str]
    rows: list[list[str]]
    words: int = 1
    caption: str = ""
    kind: str = "table"


class Gallery(NamedTuple):
    """Pictures, one after the other."""

    pictures: list[Picture]
    caption: str = ""
    kind: str = "gallery"


class Sheet(NamedTuple):
    """Rows are prompts, columns are models: (prompt, seed, pictures)."""

    head: list[str]
    rows: list[tuple[str, str, list[Picture]]]
    caption: str = ""
    kind: str = "sheet"


Block = Note | Table | Gallery | Sheet


class Section(NamedTuple):
    """A title and what stands below it; `key` is its anchor."""

    key: str
    title: str
    blocks: list[Block]

    @property
    def pictures(self) -> list[Picture]:
        """Return all pictures, in the order of reading."""
        found: list[Picture] = []
        for block in self.blocks:
            if isinstance(block, Gallery):
                found += block.pictures
            elif isinstance(block, Sheet):
                for _, _, pictures in block.rows:
                    found += pictures
        return found


SMALL = 160  # pixels: up to this size pictures are the embedded model's, with crisp pixels; photographs above


class Picture(NamedTuple):
    """An image of the page: a file beside the Markdown, a data: URI in the HTML."""

    name: str
    data: bytes
    alt: str
    caption: str = ""
    wide: bool = False  # a plot or sheet with small letters, which a phone scrolls instead of shrinking it

    @property
    def uri(self) -> str:
        """Return the picture as a data: URI."""
        kind = "jpeg" if self.name.endswith(".jpg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height in pixels: with them a page does not jump while it loads."""
        with Image.open(io.BytesIO(self.data)) as image:
            return image.size


def picture(name: str, image: Image.Image, alt: str, caption: str = "") -> Picture:
    """Return an image, encoded: small ones without loss, larger ones as JPEG."""
    data = io.BytesIO()
    if max(image.size) <= SMALL:
        suffix = "png"
        image.convert("RGB").save(data, "PNG", optimize=True)
    else:
        suffix = "jpg"
        image.convert("RGB").save(data, "JPEG", quality=88)
    return Picture(f"{name}.{suffix}", data.getvalue(), alt, caption)


def stored(file: Path, name: str, alt: str, caption: str) -> Picture:
    """Return a plot that a run wrote. Raises UserError if it is no PNG."""
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is no PNG ({error}): finish the run again") from error
    return Picture(f"{name}.png", data, alt, caption, wide=True)
