"""CelebAMask-HQ's identities: the 307 people with 15 images or more, 80 % of each for training (Wu & Harandi, 2024).

A folder of one of three kinds:

    train/<identity>/*.jpg and test/<identity>/*.jpg          the identity data set of ndb796, already split
    CelebA-HQ-img/<n>.jpg and who they show                   https://github.com/switchablenorms/CelebAMask-HQ
    who they show                                             the images come from the Hub, or from a copy of it

Who they show: CelebA-HQ-identity.txt, or CelebA-HQ-to-CelebA-mapping.txt together with CelebA's identity_CelebA.txt.
No data set on the Hub knows that. An example's id is "<identity>/<n>.jpg" in all three. The archive unpacks to a
folder CelebAMask-HQ; all of this may lie in the folder that is given or in that one inside it.
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
ARCHIVE = "CelebAMask-HQ"  # the folder that the archive unpacks to
IMAGES = "CelebA-HQ-img"  # the images' folder in it
SUFFIXES = {".jpg", ".jpeg", ".png"}
COPY = hub.Copy(id="FrsECM/CelebAHQ_mask", config="default", image="image", label="image_id")
DAMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what PIL raises


class Face(NamedTuple):
    """One image of a person; where it lies comes apart."""

    identity: str
    file: str

    @property
    def id(self) -> str:
        """Return the example's id."""
        return f"{self.identity}/{self.file}"


def load(folder: str | None) -> Dataset:
    """Return the identities of a folder, 307 if it is whole; images are 224x224 RGB, which takes 0.8 GB of memory.

    Raises UserError without a folder, and for files that are missing, damaged or contradict each other.
    """
    if folder is None:
        raise UserError(
            "no data set on the Hugging Face Hub says who the people of CelebAMask-HQ are: give a data folder with "
            "CelebA-HQ-identity.txt, and the images will come from the Hub"
        )
    root = Path(folder)
    part_folders = [_find(root, part) for part in PARTS]
    if all(part.is_dir() for part in part_folders):
        parts = [_listed(part) for part in part_folders]
        _check_prepared(root, *parts)
        labelled_by = "folders train and test"
        pictures = []
        for part_folder, part in zip(part_folders, parts, strict=True):
            pictures.append(_from(part_folder, [face.id for face in part]))
    else:
        parts = list(split(identities(root)))
        labelled_by = JOINED if _find(root, JOINED).is_file() else f"{MAPPING} and {CELEBA}"
        pictures = [_pictures(root, part) for part in parts]
    classes = sorted({face.identity for face in parts[0]})  # as text: "10" comes before "2"
    return Dataset(
        name="celeba",
        train=_images(parts[0], pictures[0], classes),
        test=_images(parts[1], pictures[1], classes),
        classes=tuple(classes),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        augment="flip",
        labelled_by=labelled_by,
    )


def _find(root: Path, name: str) -> Path:
    """Return where a file or folder of this name is: in the folder, in the archive's folder inside it, or nowhere."""
    inner = root / ARCHIVE / name
    if inner.exists() and not (root / name).exists():
        return inner
    return root / name


def split(identity_of: dict[int, str]) -> tuple[list[Face], list[Face]]:
    """Return (train, test) of {image number: identity}: each one's first int(0.8 n) images by number, and the rest.

    The authors' own order within an identity is that of their file system, which nobody can restore. Raises
    UserError if nobody has 15 images, or if all 30 000 images are listed and give other numbers than those published.
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
    """Return the images of <part>/<identity>/, by identity and then by number; ._0.jpg is macOS's note, no image."""
    found = []
    for person in sorted(part.iterdir()):
        if not person.is_dir():
            continue
        for file in sorted(person.iterdir(), key=_number):
            if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
                found.append(Face(person.name, file.name))
    if not found:
        raise UserError(f"{part} has no images in folders of identities: it needs {part.name}/<identity>/<n>.jpg")
    return found


def _number(file: Path) -> tuple[float, str]:
    return (int(file.stem) if file.stem.isdecimal() else float("inf"), file.name)


def _check_prepared(root: Path, train: Sequence[Face], test: Sequence[Face]) -> None:
    people = {face.identity for face in train} ^ {face.identity for face in test}
    if people:
        raise UserError(f"{root}: identity {min(people)} is in one of train and test only: it has to be in both")
    leaked = {face.id for face in train} & {face.id for face in test}
    if leaked:
        raise UserError(f"{root}: image {min(leaked)} is in train and in test: remove it from one of them")


def _pictures(root: Path, part: Sequence[Face]) -> Iterator[Image.Image]:
    """Return the images from their folder or, if there is none, from the Hub; see `_from` and `_from_hub`."""
    folder = _find(root, IMAGES)
    if folder.is_dir():
        return _from(folder, [face.file for face in part])
    return _from_hub(root, part)


def _from_hub(root: Path, part: Sequence[Face]) -> Iterator[Image.Image]:
    """Yield the images from the Hub, or from a copy of it in the folder; UserError for one that is not there."""
    copy = str(root) if hub.is_copy(str(root)) else None
    place = {}  # image number as text: its table and its row there
    for name in PARTS:
        table = hub.table(COPY, name, copy)
        for row, image_id in enumerate(table[COPY.label]):
            place[Path(image_id).stem.lstrip("0") or "0"] = (table, row)
    for face in part:
        if Path(face.file).stem not in place:
            raise UserError(f"{COPY.id} has no image {face.file}: give a data folder with {IMAGES}")
        table, row = place[Path(face.file).stem]
        yield table[row][COPY.image]


def _from(folder: Path, names: Iterable[str]) -> Iterator[Image.Image]:
    """Yield the images of these files as RGB; UserError for one that is missing or damaged."""
    for name in names:
        try:
            with Image.open(folder / name) as image:
                yield image.convert("RGB")
        except DAMAGE as error:
            raise UserError(f"{folder / name} cannot be read ({error}): get the original file again") from error


def _images(part: Sequence[Face], pictures: Iterable[Image.Image], classes: Sequence[str]) -> Images:
    """Return the images resized bilinearly to 256x256, then the middle 224x224, as the authors do it."""
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
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"  # a header, then "0 119613 119614.jpg": its number, CelebA's, its file
CELEBA = "identity_CelebA.txt"  # "000001.jpg 2880": image of CelebA, identity


def identities(root: Path) -> dict[int, str]:
    """Return {image number: identity}, joined by file names so that the order of lines does not matter.

    Raises UserError if the files are missing, name an image twice, or a line of them is not what it should be.
    """
    joined, mapping, celeba = _find(root, JOINED), _find(root, MAPPING), _find(root, CELEBA)
    found = {}
    if joined.is_file():
        for name, identity in _pairs(joined).items():
            found[_identity_number(joined, name)] = identity
        return found
    for file in (mapping, celeba):
        if not file.is_file():
            raise UserError(
                f"{root} has no folders train and test, no {JOINED} and no {file.name}: say who is on the images, "
                f"in {JOINED} or in {MAPPING} and {CELEBA}"
            )
    people = _pairs(celeba)
    for number, name in _mapping(mapping).items():
        if name not in people:
            raise UserError(f"{celeba} has no {name}, which {MAPPING} names: get the whole file again")
        found[number] = people[name]
    return found


def _pairs(path: Path) -> dict[str, str]:
    """Return {image file: identity}, where an identity is a number."""
    found: dict[str, str] = {}
    for place, words in _lines(path):
        if len(words) != 2 or not words[1].isdecimal():
            raise UserError(f"{place} is not 'file identity', such as '1.jpg 2880': get the original file again")
        if words[0] in found:
            raise UserError(f"{place} names {words[0]} for the second time: get the original file again")
        found[words[0]] = words[1]
    return found


def _mapping(path: Path) -> dict[int, str]:
    """Return {image number: file of CelebA}; UserError for columns that were shuffled.

    They tell by CelebA's number, which counts from 0, and its file, which counts from 1.
    """
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
    """Return ("file, line n", its words) of every line that has any; UserError for a file that is no text.

    A byte order mark, which some editors put first, is no part of the text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file ({error}): get the original file again") from error
    return [(f"{path}, line {n}", line.split()) for n, line in enumerate(lines, 1) if line.strip()]
