"""A data set divided into forget set, retain set, and what to measure with."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from classification.data.dataset import Dataset, Images
from classification.data.sources import load
from classification.data.splits import forget_rows, test_rows, validation_split
from classification.settings import Data


class Parts(NamedTuple):
    """The parts; validation and test examples are of classes that are not forgotten wholly."""

    dataset: Dataset
    pool: Images
    forget: Images
    retain: Images
    val: Images
    test: Images


def partition(data: Data) -> Parts:
    """Return the parts that are asked for; the authors' split draws validation and forget set by one seed.

    Raises UserError for what cannot be read or drawn.
    """
    dataset = dataset_of(data)
    pool, held = pool_of(dataset, data.forget_seed if data.authors_split else data.split_seed)
    gone = forget_rows(data.forget, pool, data.forget_seed, authors=data.authors_split)
    kept = torch.ones(len(pool), dtype=torch.bool)
    kept[gone] = False
    retain = pool.take(kept.nonzero()[:, 0])
    val = held if len(held) else retain
    return Parts(
        dataset=dataset,
        pool=pool,
        forget=pool.take(gone),
        retain=retain,
        val=val.take(test_rows(val.labels, pool.labels, gone)),
        test=dataset.test.take(test_rows(dataset.test.labels, pool.labels, gone)),
    )


def dataset_of(data: Data) -> Dataset:
    """Return the data set, read once."""
    return _loaded(data.dataset, data.data_dir)


def fingerprint_of(data: Data) -> str:
    """Return the data set's fingerprint, computed once: what a run's identity knows of its data."""
    return _fingerprint(data.dataset, data.data_dir)


@lru_cache(maxsize=1)
def _loaded(name: str, folder: str | None) -> Dataset:
    return load(name, folder)


@lru_cache(maxsize=1)
def _fingerprint(name: str, folder: str | None) -> str:
    return _loaded(name, folder).fingerprint()


def pool_of(dataset: Dataset, seed: int) -> tuple[Images, Images]:
    """Return (what is trained on, what is held back for validation): nothing of the faces, as in the paper."""
    share = 0.0 if dataset.name == "celeba" else 0.1
    train, val = validation_split(dataset.train.labels, seed, share)
    return dataset.train.take(train), dataset.train.take(val)
