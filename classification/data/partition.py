"""A data set cut up into what to forget, what to retain, and what to judge with."""

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
    """The parts that are asked for; the authors' split draws validation and forget set by one seed.

    Raises UserError for what cannot be read or drawn.
    """
    dataset = dataset_of(data)
    pool, held = pool_of(dataset, data.forget_seed if data.authors_split else data.split_seed)
    gone = forget_rows(data.forget, pool, data.forget_seed, authors=data.authors_split)
    kept = torch.ones(len(pool), dtype=torch.bool)
    kept[gone] = False
    retain = pool.take(kept.nonzero()[:, 0])
    judged = [part.take(test_rows(part.labels, pool.labels, gone)) for part in (held or retain, dataset.test)]
    return Parts(dataset, pool, pool.take(gone), retain, *judged)


def dataset_of(data: Data) -> Dataset:
    """The data set, read once."""
    return _load(data.dataset, data.data_dir)


_load = lru_cache(maxsize=1)(load)


def pool_of(dataset: Dataset, seed: int) -> tuple[Images, Images]:
    """What is trained on, and what is held back for validation: nothing of the faces, as in the paper."""
    train, val = validation_split(dataset.train.labels, seed, share=0.0 if dataset.name == "celeba" else 0.1)
    return dataset.train.take(train), dataset.train.take(val)
