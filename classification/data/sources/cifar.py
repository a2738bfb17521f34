"""CIFAR-10 and CIFAR-100: the Hub, or the "python version" of https://www.cs.toronto.edu/~kriz/cifar.html.

An example's id is its file and row there ("data_batch_1/17"), and "hub:train/17" on the Hub, whose order is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from classification.data.dataset import Dataset, Images
from classification.data.sources import checks, hub
from classification.data.sources.unpickle import text, unpickle
from erase_sd.common.errors import UserError

SIDE = 32  # pixels
WIDTH = 3 * SIDE * SIDE  # bytes of an image: the red plane, the green one, the blue one, each row by row


@dataclass(frozen=True, kw_only=True)
class Release:
    """How one of the two is written. `train` and `test` map each file to what it says of itself ("batch_label")."""

    name: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: str  # the file with the classes' names
    names: str  # its key
    labels: str  # the key of the labels in the other files
    classes: int
    copy: hub.Copy
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = Release(
    name="cifar10",
    folder="cifar-10-batches-py",
    train={f"data_batch_{n}": f"training batch {n} of 5" for n in range(1, 6)},
    test={"test_batch": "testing batch 1 of 1"},
    meta="batches.meta",
    names="label_names",
    labels="labels",
    classes=10,
    copy=hub.Copy(id="uoft-cs/cifar10", config="plain_text", image="img", label="label"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Release(
    name="cifar100",
    folder="cifar-100-python",
    train={"train": "training batch 1 of 1"},
    test={"test": "testing batch 1 of 1"},
    meta="meta",
    names="fine_label_names",
    labels="fine_labels",
    classes=100,
    copy=hub.Copy(id="uoft-cs/cifar100", config="cifar100", image="img", label="fine_label"),
    mean=(0.5071, 0.4866, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar10(folder: str | None) -> Dataset:
    """Return CIFAR-10: 50 000 and 10 000 images, 10 classes."""
    return _load(CIFAR10, folder)


def cifar100(folder: str | None) -> Dataset:
    """Return CIFAR-100 with its 100 fine labels: 50 000 and 10 000 images."""
    return _load(CIFAR100, folder)


def _load(release: Release, folder: str | None) -> Dataset:
    if folder is None or hub.is_copy(folder):
        train, test, classes = hub.read(release.copy, folder, classes=release.classes, side=SIDE)
    else:
        train, test, classes = _from_files(release, folder)
    return Dataset(
        name=release.name,
        train=train,
        test=test,
        classes=classes,
        mean=release.mean,
        std=release.std,
        augment="crop-flip",
    )


def _from_files(release: Release, folder: str) -> tuple[Images, Images, tuple[str, ...]]:
    root = checks.root(folder, release.folder, [*release.train, *release.test, release.meta])
    train = [_batch(root / file, says, release) for file, says in release.train.items()]
    test = [_batch(root / file, says, release) for file, says in release.test.items()]
    return _joined(train), _joined(test), _names(root / release.meta, release)


def _joined(batches: Sequence[Images]) -> Images:
    """Return several files' images as one."""
    ids: list[str] = []
    for batch in batches:
        ids += batch.ids
    return Images(
        pixels=torch.cat([batch.pixels for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        ids=tuple(ids),
    )


def _batch(path: Path, says: str, release: Release) -> Images:
    """Return one file of images; UserError for wrong shapes, labels, and files that were swapped."""
    content = unpickle(path)
    for key in ("data", release.labels):
        if key not in content:
            raise UserError(f"{path} has no {key!r} among its keys {sorted(content)}: it is no file of {release.name}")
    said = content.get("batch_label", says.encode())
    if said not in (says, says.encode()):
        raise UserError(f"{path} says that it is {said!r}, not {says!r}: files were renamed or swapped, unpack again")
    data = content["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != WIDTH:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise UserError(f"{path}: 'data' is {found}, not uint8 (images, {WIDTH}): get the original file again")
    labels = checks.labels(content[release.labels], release.classes, len(data), path)
    if "coarse_labels" in content:
        _check_coarse(labels.tolist(), content["coarse_labels"], path)
    return Images(
        pixels=torch.from_numpy(data.reshape(-1, 3, SIDE, SIDE).copy()),
        labels=labels,
        ids=tuple(f"{path.name}/{row}" for row in range(len(data))),
    )


def _check_coarse(fine: list[int], coarse: object, path: Path) -> None:
    """Raise UserError unless every fine class lies in one of the 20 coarse ones: shuffled labels do not."""
    home: dict[int, int] = {}
    labels = checks.labels(coarse, 20, len(fine), path).tolist()
    for row, (fine_label, coarse_label) in enumerate(zip(fine, labels, strict=True)):
        if home.setdefault(fine_label, coarse_label) != coarse_label:
            raise UserError(
                f"{path}: image {row} has fine label {fine_label} with coarse label {coarse_label}, others have it "
                f"with {home[fine_label]}: its labels were shuffled, get the original file again"
            )


def _names(path: Path, release: Release) -> tuple[str, ...]:
    names = unpickle(path).get(release.names)
    if not isinstance(names, list) or len(names) != release.classes:
        raise UserError(f"{path} has no list of {release.classes} {release.names!r}: get the original file again")
    return tuple(text(name) for name in names)
