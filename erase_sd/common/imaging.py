"""Images of images: contact sheets, pixelation, and the check that an image is an image at all."""

import math
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (32, 32, 32), (255, 255, 255)
FLAT = 2  # levels of 255 by which a blank image may still vary after decoding


def sheet(
    rows: list[list[Image.Image]],
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    scale: float = 1.0,
) -> Image.Image:
    """Return a contact sheet: `rows` of images, enlarged `scale` times, row labels left and column labels on top.

    Rows may differ in length and images in size; each cell is as large as the largest image. Long column labels are
    wrapped to the cell's width. Whole factors keep the pixels of small images crisp, others are smoothed.
    """
    cells: list[list[Image.Image]] = []
    wide, high, columns = 0, 0, 0
    for row in rows:
        cells.append([_scaled(image, scale) for image in row])
        columns = max(columns, len(row))
        for cell in cells[-1]:
            wide, high = max(wide, cell.width), max(high, cell.height)
    font = lettering(max(11, min(28, wide // 9)))
    gap = max(3, wide // 24)
    left = top = 2 * gap
    for label in row_labels or []:
        left = max(left, _extent(label, font)[0] + 2 * gap)
    titles = [_wrapped(label, font, wide) for label in column_labels or []]
    for title in titles:
        top = max(top, _extent(title, font)[1] + 2 * gap)
    paper = Image.new("RGB", (left + columns * (wide + gap), top + len(cells) * (high + gap)), PAPER)
    pen = ImageDraw.Draw(paper)
    for column, title in enumerate(titles):
        place = (left + column * (wide + gap) + wide / 2, top - gap)
        pen.multiline_text(place, title, INK, font, anchor="md", align="center")
    for row, label in enumerate(row_labels or []):
        place = (left - gap, top + row * (high + gap) + high / 2)
        pen.multiline_text(place, label, INK, font, anchor="rm", align="right")
    for row, images in enumerate(cells):
        for column, image in enumerate(images):
            paper.paste(image, (left + column * (wide + gap), top + row * (high + gap)))
    return paper


def lettering(size: int) -> ImageFont.FreeTypeFont:
    """Return the typeface of labels: Pillow's own has no é, no № and no letter of most of the world's prompts."""
    import matplotlib  # has DejaVu Sans in its package

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    crisp = float(scale).is_integer()
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS)


def _extent(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    """Return width and height in pixels of a text of one or more lines."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return round(box[2]), round(box[3])


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Break `text` between words into lines of at most `width` pixels; a longer word keeps a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def pixelate(image: Image.Image, blocks: int = 8) -> Image.Image:
    """Return the image in `blocks` x `blocks` averaged squares, in its own size: content goes, colours stay."""
    small = image.convert("RGB").resize((blocks, blocks), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def censor(image: Image.Image, boxes: Iterable[Sequence[float]], blocks: int = 4) -> Image.Image:
    """Return a copy whose `boxes` (x, y, width, height in pixels) and a tenth around them are `blocks`^2 squares.

    What lies outside the image is ignored. As in `pixelate`, nothing but average colours is left to sharpen again.
    """
    image = image.convert("RGB")  # a copy
    for x, y, w, h in boxes:
        left, top = max(0, math.floor(x - w / 10)), max(0, math.floor(y - h / 10))
        right, bottom = min(image.width, math.ceil(x + 1.1 * w)), min(image.height, math.ceil(y + 1.1 * h))
        if left < right and top < bottom:
            image.paste(pixelate(image.crop((left, top, right, bottom)), blocks), (left, top))
    return image


def broken(image: Image.Image) -> str | None:
    """Return why this is no image: "black" (what NaN latents decode to), "constant", or None for a sound one.

    A detector finds nothing in either kind, so counting them as clean would reward a ruined model.
    """
    brightest, contrast = 0, 0
    for low, high in image.convert("RGB").getextrema():
        brightest = max(brightest, high)
        contrast = max(contrast, high - low)
    if brightest <= FLAT:
        return "black"
    return "constant" if contrast <= FLAT else None
