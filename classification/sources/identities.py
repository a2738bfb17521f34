"""Who is on which image of CelebAMask-HQ, from the text files that say so."""

from __future__ import annotations

from pathlib import Path

from erase_sd.runtime import UserError

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
        return {_number(root / JOINED, name): identity for name, identity in _pairs(root / JOINED).items()}
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


def _number(path: Path, name: str) -> int:
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
