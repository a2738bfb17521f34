"""The features of a folder's images and their statistics, computed once, chunk by chunk: <folder>/.cache.

The hash stands for the extractor's weights and preprocessing and for every image's bytes, so that a changed image or
another model never finds old numbers. Broken images have no features; which ones they are is stored with the others'.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, write_atomic
from eval.features.distances import Statistics, statistics
from eval.features.extractors import Extractor
from eval.images.folder import Entry, ImageFolder, picture

CHUNK = 256  # images per cache file: what a killed run loses at most
StoredFeatures = tuple[dict[str, Tensor], dict[str, str]]  # tensors and metadata of a safetensors file


@dataclass(frozen=True, kw_only=True)
class Features:
    """What an extractor sees in a folder."""

    path: Path  # the folder
    values: Tensor  # (N, D) float32, of the N sound images
    entries: list[Entry]  # all images in the folder's order, with what is broken
    images: str  # hash of all images' bytes

    @property
    def sound(self) -> list[Entry]:
        """Return the N images that `values` are of."""
        return [entry for entry in self.entries if not entry.broken]


def of_folder(folder: ImageFolder, extractor: Extractor, batch_size: int) -> Features:
    """Return the features of every sound image.

    Raises UserError for NaN features, and for fewer than 2 sound images.
    """
    known = []  # what stands for an image in a hash: its bytes, and what the manifest says of them
    for entry in folder.entries:
        file = folder.path / entry.file
        known.append([file_digest(file) if file.is_file() else None, entry.broken])
    parts: list[Tensor] = []
    reasons: list[str | None] = []
    with tqdm(total=len(known), desc=str(folder.path), unit="image") as bar:
        for start in range(0, len(known), CHUNK):
            chunk = folder.entries[start : start + CHUNK]
            name = digest([extractor.key, known[start : start + CHUNK]])
            file = folder.path / ".cache" / f"features-{name[:32]}.safetensors"
            tensors, notes = _cached(file, partial(_computed, folder, chunk, extractor, batch_size))
            parts.append(tensors["features"])
            reasons += json.loads(notes["broken"])
            bar.update(len(chunk))
    entries = [replace(entry, broken=reason) for entry, reason in zip(folder.entries, reasons, strict=True)]
    values = _joined(parts)
    if len(values) < 2:
        text = f"of {len(entries)} images of {folder.path} only {len(values)} can be used"
        raise UserError(f"{text}: 2 or more are needed, generate the images again")
    return Features(path=folder.path, values=values, entries=entries, images=digest(known))


def of_texts(ours: Features, extractor: Extractor, batch_size: int) -> Tensor:
    """Return (N, D) features of the prompts of the sound images, each different prompt computed once."""
    texts = [str(entry.prompt) for entry in ours.sound]
    prompts = sorted(set(texts))
    name = f"texts-{digest([extractor.key, prompts])[:32]}.safetensors"
    tensors, _ = _cached(ours.path / ".cache" / name, partial(_embedded, extractor.texts, prompts, batch_size))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    return tensors["features"][[place[text] for text in texts]]


@torch.no_grad()
def _embedded(texts: Callable[[list[str]], Tensor], prompts: list[str], batch_size: int) -> StoredFeatures:
    parts = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="prompts", unit="batch"):
        parts.append(texts(prompts[start : start + batch_size]).float().cpu())
    return {"features": torch.cat(parts)}, {}


def statistics_of(ours: Features, extractor: Extractor, file: Path | None = None) -> Statistics:
    """Return mean and covariance of the features, computed once, and write them to `file` as well if one is given."""
    name = f"statistics-{digest([extractor.key, ours.images])[:32]}.safetensors"

    def compute() -> StoredFeatures:
        mean, covariance, n = statistics(ours.values)
        notes = {"extractor": extractor.name, "key": extractor.key, "images": ours.images, "n": str(n)}
        return {"mean": mean, "covariance": covariance}, notes

    tensors, notes = _cached(ours.path / ".cache" / name, compute)
    if file:
        write_atomic(file, save(tensors, notes))
    return Statistics(tensors["mean"], tensors["covariance"], int(notes["n"]))


def read_statistics(file: Path, extractor: Extractor) -> tuple[Statistics, str]:
    """Return the statistics that --save_statistics wrote, and the hash of their images.

    A .npz is what others publish: mu and sigma of features that nobody can check. Raises UserError if there are no
    statistics in the file, or if they are of other features.
    """
    if file.suffix.lower() == ".npz":
        return _published(file), file_digest(file)
    tensors, notes = _read(file)
    if not {"mean", "covariance"} <= tensors.keys() or not {"n", "key", "images", "extractor"} <= notes.keys():
        raise UserError(f"--statistics {file} holds no statistics: write the file with --save_statistics")
    if notes["key"] != extractor.key:
        text = f"--statistics {file} was made of other features ({notes['extractor']}), not of {extractor.name}"
        raise UserError(f"{text}: give the same --features with the same weights, or write it again")
    return Statistics(tensors["mean"], tensors["covariance"], int(notes["n"])), notes["images"]


def _published(file: Path) -> Statistics:
    """Return mu and sigma of a .npz, as pytorch-fid, clean-fid and ADM publish them."""
    if not file.is_file():
        raise UserError(f"there is no file {file}: give --statistics a .npz with mu and sigma")
    try:
        with np.load(file, allow_pickle=False) as stored:
            mean, covariance = (torch.from_numpy(np.array(stored[name], np.float64)) for name in ("mu", "sigma"))
    except KeyError as error:
        raise UserError(f"--statistics {file} lacks mu or sigma: give published statistics of FID") from error
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"--statistics {file} is no .npz of numbers ({error}): download it again") from error
    mean = mean.flatten()
    if covariance.shape != (len(mean), len(mean)):
        shape = " x ".join(map(str, covariance.shape))
        raise UserError(f"--statistics {file}: mu has {len(mean)} numbers and sigma is {shape}: download it again")
    return Statistics(mean, covariance, None)


def _computed(folder: ImageFolder, entries: list[Entry], extractor: Extractor, batch_size: int) -> StoredFeatures:
    """Return the features of the sound images, and for every image why it is broken or None."""
    parts: list[Tensor] = []
    reasons: list[str | None] = []
    sound: list[Entry] = []
    batch: list[Tensor] = []
    for entry in entries:
        image, reason = picture(folder, entry)
        reasons.append(reason)
        if not reason:
            sound.append(entry)
            batch.append(extractor.prepare(image))
        if len(batch) == batch_size:
            parts.append(_forward(extractor, batch))
            batch = []
    if batch:
        parts.append(_forward(extractor, batch))
    values = _joined(parts)
    finite = values.isfinite().all(1)
    if not finite.all():
        entry = sound[int(finite.logical_not().nonzero()[0])]
        file = folder.path / entry.file
        raise UserError(f"{extractor.name} makes NaN or infinite features of {file}: give other weights")
    return {"features": values}, {"extractor": extractor.name, "broken": json.dumps(reasons)}


def _joined(parts: list[Tensor]) -> Tensor:
    """Return (N, D) of several (n, D); (0, 0) if there is no feature, whose width nobody knows then."""
    filled = [part for part in parts if len(part)]
    return torch.cat(filled) if filled else torch.zeros(0, 0)


@torch.no_grad()
def _forward(extractor: Extractor, batch: list[Tensor]) -> Tensor:
    """Return (B, D) float32 on the CPU; images of different sizes, where the network takes any, go one by one."""
    sizes = {x.shape for x in batch}
    if len(sizes) == 1:
        return extractor.images(torch.stack(batch)).float().cpu()
    return torch.cat([extractor.images(x[None]).float().cpu() for x in batch])


def _cached(file: Path, compute: Callable[[], StoredFeatures]) -> StoredFeatures:
    """Read the file, which is computed and written first where it is not there."""
    if not file.is_file():
        tensors, notes = compute()
        write_atomic(file, save({name: x.contiguous() for name, x in tensors.items()}, notes))
    return _read(file)


def _read(file: Path) -> StoredFeatures:
    if not file.is_file():
        raise UserError(f"there is no file {file}: write it with --save_statistics")
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
            return tensors, stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run the same command again") from error
