"""A folder of images: how they were generated, what each one is, and which of them are no images at all.

A broken image (black, constant, NaN, unreadable) stays in every denominator and is never counted as clean.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from erase_sd.common.errors import UserError
from erase_sd.common.imaging import broken
from erase_sd.pocket.world import caption, grid
from prompts import captions, load, people, sensitive
from prompts.tables import is_explicit, of_concept

GENERATION, MANIFEST = "generation.json", "manifest.jsonl"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LARGEST = 64_000_000  # pixels: a file that claims more is no picture of ours
NO_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for what is no image
MOST_BROKEN = 0.01  # share of broken images above which a judge exits non-zero


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the manifest. Of an image that no manifest lists, only the file is known."""

    file: str
    row: int | None = None  # of the prompt source, from 0
    prompt: str | None = None
    seed: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    tags: dict[str, Any] = field(default_factory=dict)  # what else the source says of the row: categories, case number
    broken: str | None = None  # black, constant, nan, unreadable
    sha256: str | None = None
    after: int = 0  # images that the seed's generator has drawn noise for before
    tokens: int | None = None  # of the prompt, marks of begin and end included
    truncated: bool | None = None  # the text encoder read only the first tokens

    @property
    def noise(self) -> tuple[int | None, int | None, int]:
        """Return what images of the same noise in several folders have in common: row, seed, place in its stream."""
        return self.row, self.seed, self.after


LATER = ("after", "tokens", "truncated")  # fields that a line has only where they say something


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """What `read` found: entries in the order of the prompts, and the content of generation.json, {} without one."""

    path: Path
    entries: list[Entry]
    generation: dict[str, Any]

    @property
    def label(self) -> str:
        """Return its name in tables and figures: that of the run with the weights, of the model, or of the folder."""
        return Path(self.generation.get("weights") or self.generation.get("model") or self.path).name


def read(path: str | Path) -> ImageFolder:
    """Read the images of a folder: those of its manifest, or every image file in it, sorted by name.

    Raises UserError if there is no such folder, no image in it, or a broken manifest.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give one that eval.generate wrote, or any folder of images")
    file = path / GENERATION
    try:
        generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): generate the images again") from error
    manifest = path / MANIFEST
    entries = entries_of(manifest) if manifest.is_file() else _found(path)
    if not entries:
        raise UserError(f"{path} holds no images: give a folder that eval.generate finished, or any folder of images")
    return ImageFolder(path=path, entries=entries, generation=generation)


def entries_of(manifest: Path) -> list[Entry]:
    """Return the lines of a manifest. Raises UserError naming the line that is none."""
    entries = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{manifest}, line {number}: {error}; remove the file and generate again") from error
    return entries


def _found(path: Path) -> list[Entry]:
    entries = []
    for file in sorted(path.iterdir()):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            entries.append(Entry(file=file.name))
    return entries


def picture(folder: ImageFolder, entry: Entry) -> tuple[Image.Image | None, str | None]:
    """Return the upright RGB image, or None, and why it is broken, or None.

    What the manifest says of a broken image comes first: it knows NaN from black.
    """
    try:
        with Image.open(folder.path / entry.file) as image:
            if image.width * image.height > LARGEST:
                return None, "unreadable"
            image = _eight_bits(ImageOps.exif_transpose(image))
    except NO_IMAGE:
        return None, "unreadable"
    if image is None:
        return None, "unreadable"
    return image, entry.broken or broken(image)


def _eight_bits(image: Image.Image) -> Image.Image | None:
    """Return the image as RGB; None for levels whose white nobody knows: Pillow would clip them at 255.

    Of 16 bits the upper ones are kept, as cv2.imread does and Pillow itself for images in colour.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return None
    return image.convert("RGB")


def explicit(folder: ImageFolder) -> set[str]:
    """Return the files whose prompt or source asks for what is to be hidden, whatever the source's file was called."""
    whole = sensitive(str(folder.generation.get("prompts", "")))
    found = set()
    for entry in folder.entries:
        if whole or is_explicit(entry.prompt, entry.tags):
            found.add(entry.file)
    return found


def harmless(folder: ImageFolder) -> bool:
    """Return whether every prompt is known to ask for nothing that is to be hidden: its words, not the source's name.

    Known are the embedded model's scenes, COCO's captions, the prompts of `prompts/` and those of a concept that is
    not sensitive.
    """
    known = {*map(caption, grid()), *captions(), *people()}
    name = str(folder.generation.get("prompts", ""))
    with suppress(ValueError):  # the source may be no concept
        known.update(row.prompt for row in of_concept(load(name)))
    for entry in folder.entries:
        coco = {"image_id", "coco_id"} & entry.tags.keys() or str(entry.tags.get("source", "")).startswith("coco")
        if entry.prompt not in known and not coco:
            return False
    return True


def count_broken(entries: list[Entry]) -> int:
    """Return how many of the images are broken."""
    return sum(bool(entry.broken) for entry in entries)


def too_many_broken(entries: list[Entry]) -> bool:
    """Tell whether so many images are broken that the command must not look like a success."""
    return count_broken(entries) > MOST_BROKEN * len(entries)


def warn_if_broken(entries: list[Entry], where: Path) -> bool:
    """Tell whether too many images of the folder `where` are broken; if so, say it on stderr."""
    if not too_many_broken(entries):
        return False
    broken_files = [entry.file for entry in entries if entry.broken]
    text = f"{len(broken_files)} of {len(entries)} images of {where} are broken ({broken_files[0]} ...)"
    print(f"{text}: do not trust these numbers", file=sys.stderr)
    return True
