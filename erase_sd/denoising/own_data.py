"""The user's own pictures and prompts: the only reader of these folders and files.

A folder holds pictures and, where there are captions, one of

    metadata.jsonl   {"file_name": "1.png", "text": "a photo of my cat"} a line, as Hugging Face's image folders have
                     it; an "anchor" may say what the model may draw instead
    1.txt, ...       beside each picture, its caption
    captions.txt     one caption a line, in the order of the pictures' names

Raises UserError, one sentence that names the file, for whatever cannot be used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from erase_sd.common.errors import UserError, asked_by_the_user
from prompts.tables import read_file

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
METADATA, CAPTIONS = "metadata.jsonl", "captions.txt"
TEXTS = ("text", "caption", "prompt")  # names that metadata.jsonl may give a caption
NO_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for what is no image


class OwnPicture(NamedTuple):
    """One picture of the user, with what the folder says of it."""

    path: Path
    caption: str | None = None
    anchor: str | None = None


def pictures(folder: str, option: str) -> list[OwnPicture]:
    """Return the pictures of a folder in the order of their names, each of them readable, with captions or without."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"{option} {folder} is no folder: give one with pictures")
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise UserError(
            f"{option} {folder} holds no pictures: give a folder with some ({', '.join(sorted(SUFFIXES))})"
        )
    for file in files:
        try:
            opened(file)
        except NO_IMAGE as error:
            raise UserError(f"{option}: {file} is no readable picture ({error}): remove or replace it") from error
    return _captioned(place, files, option)


def captions_of(found: list[OwnPicture], option: str) -> list[str]:
    """Return a caption for each picture; UserError for the first that has none."""
    texts = []
    for picture in found:
        if picture.caption is None:
            raise UserError(
                f"{option}: {picture.path} has no caption: write {METADATA}, {CAPTIONS} or a .txt beside it"
            )
        texts.append(picture.caption)
    return texts


def lines(file: str, option: str) -> list[str]:
    """Return the prompts of a .txt, one a line, or of a .csv; empty ones are left out."""
    if Path(file).suffix.lower() not in (".txt", ".csv"):
        raise UserError(f"{option} {file} is no .txt or .csv: give a file of prompts, one a line")
    try:
        with asked_by_the_user():
            rows = read_file(Path(file)).rows
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read ({error}): give a file of prompts") from error
    found = list(filter(None, (" ".join(row.prompt.split()) for row in rows)))
    if not found:
        raise UserError(f"{option} {file} holds no prompts: give one a line")
    return list(dict.fromkeys(found))


def opened(file: Path) -> Image.Image:
    """Return a picture upright, in RGB, cut to the square in its middle. Raises one of NO_IMAGE for what is none."""
    with Image.open(file) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    side = min(upright.size)
    return ImageOps.fit(upright, (side, side))


def _captioned(place: Path, files: list[Path], option: str) -> list[OwnPicture]:
    """Return the pictures with what one of the three ways says of them."""
    if (place / METADATA).is_file():
        return _described(place / METADATA, files, option)
    if (place / CAPTIONS).is_file():
        texts = _lines(place / CAPTIONS, option)
        if len(texts) != len(files):
            raise UserError(f"{option}: {place / CAPTIONS} has {len(texts)} lines for {len(files)} pictures: one each")
        return [_picture(file, text, None, option) for file, text in zip(files, texts, strict=True)]
    beside = {file: file.with_suffix(".txt") for file in files}
    there = [file for file in files if beside[file].is_file()]
    if not there:
        return list(map(OwnPicture, files))
    for file in files:
        if not beside[file].is_file():
            raise UserError(
                f"{option}: {file} has no caption while {there[0].name} has one: write {beside[file].name}"
            )
    return [_picture(file, _text(beside[file], option), None, option) for file in files]


def _described(metadata: Path, files: list[Path], option: str) -> list[OwnPicture]:
    """Return the pictures as metadata.jsonl describes them."""
    known: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_lines(metadata, option), 1):
        try:
            row = dict(json.loads(line))
            known[str(row["file_name"])] = row
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{option}: line {number} of {metadata} is no picture's ({error!r}): correct it"
            ) from error
    missing = sorted(known.keys() - {file.name for file in files})
    if missing:
        raise UserError(f"{option}: {metadata} names {missing[0]}, which is not there: add it or remove the line")
    found = []
    for file in files:
        row = known.get(file.name, {})
        text = next((row[name] for name in TEXTS if name in row), None)
        if not isinstance(text, str):
            raise UserError(f"{option}: {metadata} has no text for {file.name}: add a line with file_name and text")
        found.append(_picture(file, text, row.get("anchor"), option))
    return found


def _picture(file: Path, caption: str, anchor: object, option: str) -> OwnPicture:
    """Return one picture with its texts on one line; UserError for an empty one."""
    caption = " ".join(caption.split())
    if not caption:
        raise UserError(f"{option}: the caption of {file} is empty: write what it shows")
    return OwnPicture(file, caption, " ".join(str(anchor).split()) if anchor else None)


def _lines(file: Path, option: str) -> list[str]:
    """Return the lines of a file, which end at LF and CR LF only: other separators belong to the texts."""
    return _text(file, option).rstrip("\n").split("\n")


def _text(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {file} cannot be read as UTF-8 ({error}): save it so") from error
