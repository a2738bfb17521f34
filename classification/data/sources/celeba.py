"""CelebAMask-HQ's identities: the 307 people with 15 images or more, 80 % of each for training (Wu & Harandi, 2024).

A folder of one of three kinds:

    train/<identity>/*.jpg and test/<identity>/*.jpg          the identity data set of ndb796, already split
    CelebA-HQ-img/<n>.jpg and who they show                   https://github.com/switchablenorms/CelebAMask-HQ
    who they show                                             the images come from the Hub, or from a copy of it

Who they show: CelebA-HQ-identity.txt, or CelebA-HQ-to-CelebA-mapping.txt together with CelebA's identity_CelebA.txt.
No data set on the Hub knows that. An example's id is "<identity>/<n>.jpg" in all three.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from classification.data.dataset import Dataset, Images
from classification.data.sources import hub
from erase_sd.common.errors import UserError

LEAST = 15  # images of an identity that is kept
ALL = 30_000  # images of CelebAMask-HQ, of which come:
EXPECTED = (6217, 307, 4263, 1215)  # identities, identities kept, training images, test images
RESIZED, SIDE = 256, 224  # pixels, before and after cropping
PARTS = ("train", "test")
SUFFIXES = {".jpg", ".jpeg", ".png"}
COPY = hub.Copy(id="FrsECM/CelebAHQ_mask", config="default", image="image", label="image_id")
DAMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what PIL raises


class Face(NamedTuple):
    """One image of a person; where it lies comes apart."""

    identity: str
    file: str

    @property
    def id(self) -> str:
        return f"{self.identity}/{self.file}"


def load(folder: str | None) -> Dataset:
    """The identities of a folder, 307 if it is whole; images are 224x224 RGB, which takes 0.8 GB of memory."""
    if folder is None:
        raise UserError(
            "no data set on the Hugging Face Hub says who the people of CelebAMask-HQ are: give a data folder with "
            "CelebA-HQ-identity.txt, and the images will come from the Hub"
        )
    root = Path(folder)
    if all((root / part).is_dir() for part in PARTS):
        parts = _listed(root / PARTS[0]), _listed(root / PARTS[1])
        _check_prepared(root, *parts)
        pictures = [_from(root / name, (x.id for x in part)) for name, part in zip(PARTS, parts, strict=True)]
    else:
        parts = split(identities(root))
        pictures = [_pictures(root, part) for part in parts]
    classes = sorted({x.identity for x in parts[0]})  # as text: "10" comes before "2"
    train, test = (_images(part, faces, classes) for part, faces in zip(parts, pictures, strict=True))
    return Dataset(
        name="celeba",
        train=train,
        test=test,
        classes=tuple(classes),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment="flip",
    )


def split(identity_of: dict[int, str]) -> tuple[list[Face], list[Face]]:
    """(train, test) of {image number: identity}: of each identity the first int(0.8 n) images by number, and the rest.

    The authors' own order within an identity is that of their file system, which nobody can restore. UserError if
    nobody has 15 images, or if all 30 000 images are listed and give other numbers than those published.
    """
    counts = Counter(identity_of.values())
    kept = sorted(identity for identity, count in counts.items() if count >= LEAST)
    if not kept:
        raise UserError(f"no identity has {LEAST} images or more: give all of CelebAMask-HQ's identities")
    seen: Counter[str] = Counter()
    parts: tuple[list[Face], list[Face]] = ([], [])
    for identity, number in sorted((identity, number) for number, identity in identity_of.items()):
        if counts[identity] >= LEAST:
            parts[seen[identity] >= counts[identity] * 4 // 5].append(Face(identity, f"{number}.jpg"))
            seen[identity] += 1
    found = (len(counts), len(kept), len(parts[0]), len(parts[1]))
    if len(identity_of) == ALL and found != EXPECTED:
        raise UserError(
            f"CelebAMask-HQ has {EXPECTED} identities, identities with {LEAST} images, training and test images, but "
            f"this list gives {found}: its lines were shuffled or changed, get the original file again"
        )
    return parts


def _listed(part: Path) -> list[Face]:
    """The images of <part>/<identity>/, by identity and then by number."""
    found = [
        Face(person.name, file.name)
        for person in sorted(part.iterdir())
        if person.is_dir()
        for file in sorted(person.iterdir(), key=_number)
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise UserError(f"{part} has no images in folders of identities: it needs {part.name}/<identity>/<n>.jpg")
    return found


def _number(file: Path) -> tuple[float, str]:
    return (int(file.stem) if file.stem.isdecimal() else float("inf"), file.name)


def _check_prepared(root: Path, train: Sequence[Face], test: Sequence[Face]) -> None:
    people = {x.identity for x in train} ^ {x.identity for x in test}
    if people:
        raise UserError(f"{root}: identity {min(people)} is in one of train and test only: it has to be in both")
    if leaked := {x.id for x in train} & {x.id for x in test}:
        raise UserError(f"{root}: image {min(leaked)} is in train and in test: remove it from one of them")


def _pictures(root: Path, part: Sequence[Face]) -> Iterator[Image.Image]:
    """The images from their folder or, if there is none, from the Hub; UserError for a missing or a damaged one."""
    folder = root / "CelebA-HQ-img"
    return _from(folder, (x.file for x in part)) if folder.is_dir() else _from_hub(root, part)


def _from_hub(root: Path, part: Sequence[Face]) -> Iterator[Image.Image]:
    tables = [hub.table(COPY, split, str(root) if hub.is_copy(str(root)) else None) for split in PARTS]
    rows = {Path(name).stem.lstrip("0") or "0": (t, row) for t in tables for row, name in enumerate(t[COPY.label])}
    for x in part:
        if Path(x.file).stem not in rows:
            raise UserError(f"{COPY.id} has no image {x.file}: give a data folder with CelebA-HQ-img")
        table, row = rows[Path(x.file).stem]
        yield table[row][COPY.image]


def _from(folder: Path, names: Iterable[str]) -> Iterator[Image.Image]:
    for name in names:
        try:
            with Image.open(folder / name) as image:
                yield image.convert("RGB")
        except DAMAGE as error:
            raise UserError(f"{folder / name} cannot be read ({error}): get the original file again") from error


def _images(part: Sequence[Face], pictures: Iterable[Image.Image], classes: Sequence[str]) -> Images:
    """Resized bilinearly to 256x256, then the middle 224x224, as the authors do it."""
    pixels = torch.empty(len(part), 3, SIDE, SIDE, dtype=torch.uint8)
    edge = (RESIZED - SIDE) // 2
    for row, picture in enumerate(pictures):
        face = picture.convert("RGB").resize((RESIZED, RESIZED), Image.Resampling.BILINEAR)
        face = face.crop((edge, edge, edge + SIDE, edge + SIDE))
        pixels[row] = torch.from_numpy(np.array(face)).permute(2, 0, 1)
    index = {identity: label for label, identity in enumerate(classes)}
    return Images(
        pixels=pixels,
        labels=torch.tensor([index[x.identity] for x in part]),
        ids=tuple(x.id for x in part),
    )


JOINED = "CelebA-HQ-identity.txt"  # "0.jpg 6376": image of CelebAMask-HQ, identity
MAPPING = (
    "CelebA-HQ-to-CelebA-mapping.txt"  # a header, then "0 119613 119614.jpg": its number, CelebA's, CelebA's file
)
CELEBA = "identity_CelebA.txt"  # "000001.jpg 2880": image of CelebA, identity


def identities(root: Path) -> dict[int, str]:
    """{image number: identity}, joined by file names so that the order of lines does not matter.

    UserError if the files are missing, name an image twice, or a line of them is not what it should be.
    """
    if (root / JOINED).is_file():
        return {_identity_number(root / JOINED, name): identity for name, identity in _pairs(root / JOINED).items()}
    for file in (MAPPING, CELEBA):
        if not (root / file).is_file():
            raise UserError(
                f"{root} has no folders train and test, no {JOINED} and no {file}: say who is on the images, "
                f"in {JOINED} or in {MAPPING} and {CELEBA}"
            )
    people = _pairs(root / CELEBA)
    found = {}
    for number, name in _mapping(root / MAPPING).items():
        if name not in people:
            raise UserError(f"{root / CELEBA} has no {name}, which {MAPPING} names: get the whole file again")
        found[number] = people[name]
    return found


def _pairs(path: Path) -> dict[str, str]:
    """{image file: identity}, where an identity is a number."""
    found: dict[str, str] = {}
    for place, words in _lines(path):
        if len(words) != 2 or not words[1].isdecimal():
            raise UserError(f"{place} is not 'file identity', such as '1.jpg 2880': get the original file again")
        if words[0] in found:
            raise UserError(f"{place} names {words[0]} for the second time: get the original file again")
        found[words[0]] = words[1]
    return found


def _mapping(path: Path) -> dict[int, str]:
    """{image number: file of CelebA}. CelebA's number, from 0, and its file, from 1, tell if columns were shuffled."""
    found: dict[int, str] = {}
    for place, words in _lines(path):
        if words[:2] == ["idx", "orig_idx"]:
            continue
        if len(words) < 3 or not (words[0] + words[1]).isdecimal() or words[2] != f"{int(words[1]) + 1:06d}.jpg":
            raise UserError(f"{place} is not like '0 119613 119614.jpg': get the original file again")
        if int(words[0]) in found:
            raise UserError(f"{place} names image {words[0]} for the second time: get the original file again")
        found[int(words[0])] = words[2]
    return found


def _identity_number(path: Path, name: str) -> int:
    stem = name.removesuffix(".jpg")
    if not stem.isdecimal():
        raise UserError(f"{path} names {name!r}, but CelebAMask-HQ's images are called 0.jpg to 29999.jpg: correct it")
    return int(stem)


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """("file, line n", its words) of every line that has any."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file ({error}): get the original file again") from error
    return [(f"{path}, line {n}", line.split()) for n, line in enumerate(lines, 1) if line.strip()]
