"""Where data sets come from. `load` reads one from the Hugging Face Hub, or from a folder in its original format.

    load("fashion")                          # a part of Fashion-MNIST, embedded: no network, no folder
    load("cifar10")                          # the Hub, through `datasets`
    load("cifar10", "/data/cifar-10-batches-py")

A folder may also be a downloaded copy of the Hub's repository, for machines that cannot reach it.

fashion     Fashion-MNIST at half its size, embedded
digits      scikit-learn's, embedded
cifar       CIFAR-10 and CIFAR-100, pickles of Python 2
svhn        SVHN's cropped digits, MATLAB files
celeba      CelebAMask-HQ's faces by identity, image files and lists
idx         Fashion-MNIST, MNIST and KMNIST, IDX files
hub         parquet files of the Hub
unpickle    reads a pickle without running what it says
matlab      reads a MATLAB file in a process of its own
checks      what every source checks in its files
"""

from pathlib import Path

from classification.data.dataset import Dataset
from classification.data.sources import celeba, cifar, digits, fashion, idx, svhn
from erase_sd.common.errors import UserError

DATASETS = {
    "fashion": fashion.load,
    "digits": digits.load,
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "svhn": svhn.load,
    "celeba": celeba.load,
    "fashion-mnist": idx.fashion,
    "mnist": idx.mnist,
    "kmnist": idx.kmnist,
}


def load(name: str, folder: str | None = None) -> Dataset:
    """Return the data set of this name, in memory; `folder` None asks the Hub. UserError for what cannot be read."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"the data folder {folder} does not exist: give the folder that holds {name}")
    return DATASETS[name](folder)
