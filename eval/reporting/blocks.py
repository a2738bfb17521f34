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
    """Columns after the first `words` hold numbers."""

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
        """All pictures, in the order of reading."""
        found: list[Picture] = []
        for block in self.blocks:
            if isinstance(block, Gallery):
                found += block.pictures
            elif isinstance(block, Sheet):
                found += [picture for row in block.rows for picture in row[-1]]
        return found


SMALL = 160  # pixels: up to this size pictures are drawn ones with crisp pixels, photographs above


class Picture(NamedTuple):
    """An image of the page: a file beside the Markdown, a data: URI in the HTML."""

    name: str
    data: bytes
    alt: str
    caption: str = ""
    wide: bool = False  # a plot or sheet with small letters, which a phone scrolls instead of shrinking it

    @property
    def uri(self) -> str:
        kind = "jpeg" if self.name.endswith(".jpg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height: with them a page does not jump while it loads."""
        with Image.open(io.BytesIO(self.data)) as image:
            return image.size


def picture(name: str, image: Image.Image, alt: str, caption: str = "") -> Picture:
    """An image, encoded: small ones without loss, larger ones as JPEG."""
    kind, suffix = ("PNG", "png") if max(image.size) <= SMALL else ("JPEG", "jpg")
    data = io.BytesIO()
    image.convert("RGB").save(data, kind, **({"quality": 88} if kind == "JPEG" else {"optimize": True}))
    return Picture(f"{name}.{suffix}", data.getvalue(), alt, caption)


def stored(file: Path, name: str, alt: str, caption: str) -> Picture:
    """A plot that a run wrote. Raises UserError if it is no PNG."""
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} is no PNG ({error}): finish the run again") from error
    return Picture(f"{name}.png", data, alt, caption, wide=True)
