"""The Hugging Face Hub, read through `datasets`: parquet files only, so that nothing from there runs as code.

A folder with a copy of the repository will do as well: hf download uoft-cs/cifar10 --repo-type dataset --local-dir D.
Ids are the rows of the parquet files ("hub:train/17"), whose order need not be that of the original files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from classification.data.dataset import Images
from classification.data.sources import checks
from erase_sd.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Where the Hub has a data set, and what its columns are called."""

    id: str
    config: str
    image: str
    label: str
    mode: Literal["RGB", "L"] = "RGB"  # three channels or one, as PIL calls them


def is_copy(folder: str) -> bool:
    """Return whether the folder holds parquet files, as a downloaded repository does."""
    return next(Path(folder).rglob("*.parquet"), None) is not None


def read(copy: Copy, folder: str | None, *, classes: int, side: int) -> tuple[Images, Images, tuple[str, ...]]:
    """Return (train, test, class names) of the Hub, or of a folder with its copy; images are side x side pixels.

    Raises UserError if the Hub cannot be reached, and for columns, labels or sizes other than the data set's.
    """
    train, test = table(copy, "train", folder), table(copy, "test", folder)
    names = getattr(train.features[copy.label], "names", None) or list(map(str, range(classes)))
    if len(names) != classes:
        raise UserError(f"{folder or copy.id} has {len(names)} classes, not {classes}: it is another data set")
    return (
        _images(copy, train, "train", classes, side),
        _images(copy, test, "test", classes, side),
        tuple(names),
    )


def table(copy: Copy, split: str, folder: str | None) -> Any:
    """Return one split, a `datasets.Dataset` with the two columns of `copy`.

    Raises UserError that says what to do without it.
    """
    datasets = checks.library("datasets")
    try:
        if folder is None:
            found = datasets.load_dataset(copy.id, copy.config, split=split)
        else:
            found = datasets.load_dataset("parquet", data_files=_files(folder, copy.config, split), split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = f"the data folder {folder}" if folder else f"{copy.id} on the Hugging Face Hub"
        raise UserError(
            f"{where} cannot be read ({error}): give a data folder with the original files or with a copy of "
            f"huggingface.co/datasets/{copy.id}, or use the data set fashion, which runs offline"
        ) from error
    missing = {copy.image, copy.label} - set(found.column_names)
    if missing:
        raise UserError(f"{folder or copy.id} has no column {min(missing)!r}, only {', '.join(found.column_names)}")
    return found


def _files(folder: str, config: str, split: str) -> list[str]:
    """Return the parquet files of a split, in order; a repository has a folder for each of several configurations."""
    root = Path(folder, config)
    if not root.is_dir():
        root = Path(folder)
    files = sorted(map(str, root.rglob(f"{split}*.parquet")))
    if not files:
        raise UserError(f"{root} has no {split}*.parquet: download all of the repository again")
    return files


def _images(copy: Copy, part: Any, split: str, classes: int, side: int) -> Images:
    place = f"the {split} split of {copy.id}"
    channels = len(copy.mode)  # a letter for each
    pixels = np.empty((len(part), side, side, channels), np.uint8)
    for row, image in enumerate(part[copy.image]):
        if not isinstance(image, Image.Image) or image.size != (side, side):
            raise UserError(f"{place}: row {row} is no image of {side}x{side} pixels: it is another data set")
        pixels[row] = np.asarray(image.convert(copy.mode)).reshape(side, side, channels)
    return Images(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        labels=checks.labels(part[copy.label][:], classes, len(part), place),
        ids=tuple(f"hub:{split}/{row}" for row in range(len(part))),
    )
