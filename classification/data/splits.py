"""Which examples train, validate and are to be forgotten.

    train, val = validation_split(data.train.labels, split_seed=1)     # once per trained network
    pool = data.train.take(train)
    forget = forget_rows("random:0.1", pool, seed=2)                   # rows of the pool, many per network
    test = test_rows(data.test.labels, pool.labels, forget)

The two seeds are apart. The authors' code draws the validation images anew for every seed, from a network that was
trained on the images of one, so that a tenth of what they forget was never learnt. `authors=True` draws as they do.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from classification.data.dataset import Images
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator

SPECS = "random:0.1 (a share of the examples), class:3, identities:30 (that many classes) or indices:FILE"


def validation_split(labels: Tensor, split_seed: int, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """Return (training rows, ascending; validation rows, class by class), int64, of labels (N,) int64.

    Validation gets int(share * n) of the n examples of each class, drawn as the authors' code does
    (github.com/JingWu321/Scissorhands): same labels in the same order, same seed, same rows.
    """
    if not 0 <= share < 1:
        raise UserError(f"the validation share {share} is outside [0, 1): give 0.1, or 0 for no validation examples")
    draw, y = _legacy(split_seed, "split"), labels.numpy()
    chosen = []
    for c in np.unique(y):
        rows = np.flatnonzero(y == c)
        chosen.append(draw.choice(rows, int(share * len(rows)), replace=False))
    val = np.concatenate(chosen)
    return torch.from_numpy(np.setdiff1d(np.arange(len(y)), val)), torch.from_numpy(val)


def forget_rows(spec: str, images: Images, seed: int, authors: bool = False) -> Tensor:
    """Return the rows of `images`, the training pool, to forget, ascending int64. `spec` is one of SPECS.

    A share is rounded down. `authors` draws from the legacy generators that the authors' code uses, from the same pool
    in the same order the same rows. Raises UserError for a spec that cannot be read, or selects nothing or everything.
    """
    kind, _, value = spec.partition(":")
    if kind not in KINDS:
        raise UserError(f"--forget {spec!r} is not understood: give {SPECS}")
    rows = KINDS[kind](value, images, seed, authors)
    if not len(rows):
        raise UserError(f"--forget {spec} selects none of the {len(images)} training examples: ask for more")
    if len(rows) == len(images):
        raise UserError(f"--forget {spec} selects all {len(images)} training examples: leave some to retain")
    return rows


def test_rows(test_labels: Tensor, pool_labels: Tensor, forget: Tensor) -> Tensor:
    """Return the test rows, ascending int64, whose class has training examples left once the rows `forget` are gone.

    What a network does with a class that it was to forget wholly says nothing about what it was to keep.
    """
    kept = torch.ones(len(pool_labels), dtype=torch.bool)
    kept[forget] = False
    return torch.isin(test_labels, pool_labels[kept]).nonzero()[:, 0]


def _random(value: str, images: Images, seed: int, authors: bool) -> Tensor:
    try:
        share = Decimal(value)
    except InvalidOperation:
        share = Decimal("nan")
    if not (share.is_finite() and 0 < share < 1):
        raise UserError(f"--forget random:{value}: {value!r} is no share between 0 and 1: give random:0.1")
    count = int(share * len(images))  # decimal: 0.29 of 100 is 29, for binary fractions it is 28.999...
    return _choice(len(images), count, seed - 1 if authors else seed, authors).sort().values


def _class(value: str, images: Images, seed: int, authors: bool) -> Tensor:
    rows = (images.labels == _whole(value, "class")).nonzero()[:, 0]
    if not len(rows):
        low, high = images.labels.aminmax()
        raise UserError(f"--forget class:{value}: no example has this class: the classes are {low} to {high}")
    return rows


def _identities(value: str, images: Images, seed: int, authors: bool) -> Tensor:
    classes = images.labels.unique()
    count = _whole(value, "identities")
    if not 0 < count < len(classes):
        raise UserError(f"--forget identities:{value}: there are {len(classes)}: give 1 to {len(classes) - 1} of them")
    return torch.isin(images.labels, classes[_choice(len(classes), count, seed, authors)]).nonzero()[:, 0]


def _indices(value: str, images: Images, seed: int, authors: bool) -> Tensor:
    try:
        lines = Path(value).read_text(encoding="utf-8-sig").splitlines()  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--forget indices:{value} cannot be read ({error}): give a text file of ids") from error
    row_of = {name: row for row, name in enumerate(images.ids)}
    rows = set()
    for n, line in enumerate(lines, 1):
        name = line.strip()
        row = row_of.get(name, int(name) if _is_whole(name) else -1)
        if name and not 0 <= row < len(images):
            raise UserError(
                f"{value}, line {n}: {name!r} is not among the training examples: give an id, such as "
                f"{images.ids[0]}, or a row from 0 to {len(images) - 1}"
            )
        if name:
            rows.add(row)
    return torch.tensor(sorted(rows), dtype=torch.int64)


KINDS: dict[str, Callable[[str, Images, int, bool], Tensor]] = {
    "random": _random,
    "class": _class,
    "identities": _identities,
    "indices": _indices,
}


def _whole(text: str, kind: str) -> int:
    if not _is_whole(text):
        raise UserError(f"--forget {kind}:{text}: {text!r} is no whole number: give one, such as {kind}:3")
    return int(text)


def _is_whole(text: str) -> bool:
    return text.isdecimal() and len(text) < 10  # fits every integer type


def _choice(n: int, count: int, seed: int, authors: bool) -> Tensor:
    """Draw `count` different numbers below n: (count,) int64, in the order drawn."""
    if authors:
        return torch.from_numpy(_legacy(seed, "forget").choice(n, count, replace=False))
    return torch.randperm(n, generator=generator(seed, "forget"))[:count]


def _legacy(seed: int, purpose: str) -> RandomState:
    """Return numpy's generator of old, which draws what numpy.random.seed(seed) would, without its global state."""
    try:
        return RandomState(seed)
    except ValueError as error:
        raise UserError(f"the {purpose} seed gives {seed}, which is outside 0..2**32-1: give another") from error
