"""The entries of quality.json: what each metric needs, and what it says of one folder's features.

{"name", "title", "value", "unit", "higher_is_better", "n", "features", "against", "values" (optional), "protocol"}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from erase_sd.common.errors import UserError
from eval.features import distances
from eval.features.cache import Features, of_texts, statistics_of
from eval.features.distances import Statistics
from eval.features.extractors import Extractor
from eval.images.folder import Entry, ImageFolder, picture

Metric = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the folders are compared with, and how."""

    extractor: Extractor
    seed: int = 0
    batch_size: int = 32
    against: str | None = None  # as the user named it
    theirs: Features | None = None  # of the baseline
    statistics: Statistics | None = None  # of the baseline, or of the file
    images: str | None = None  # hash of the images behind them


def fid(ours: Features, setting: Setting) -> list[Metric]:
    """Return the squared Fréchet distance of two normal distributions: 0 for the same images, biased up for few."""
    mine = statistics_of(ours, setting.extractor)
    theirs = setting.statistics
    note = {"estimator": "Fréchet distance, float64, covariance divided by n - 1", "bias": "compare only equal n"}
    n, width = min(mine.n, theirs.n or mine.n), len(mine.mean)
    if theirs.n is None:
        note["statistics"] = "published, of features and images that are not checked"
    if n <= width:
        note["warning"] = f"{n} images span fewer than the {width} dimensions of the features: the bias is large"
    value = distances.frechet(mine, theirs)
    return [_entry(ours, setting, "fid", value, "squared distance", [mine.n, theirs.n], note)]


def kid(ours: Features, setting: Setting) -> list[Metric]:
    """Return unbiased polynomial MMD², the mean over subsets; below 0 where images of one seed are nearly the same."""
    x, y = ours.values, setting.theirs.values
    values = distances.kernel_distance(x, y, setting.seed)
    size = min(distances.SUBSET_SIZE, len(x), len(y))
    note = {"estimator": "unbiased MMD^2, kernel (x.y/d + 1)^3, mean over subsets", "seed": setting.seed}
    note |= {"subsets": len(values), "subset_size": size}
    entry = _entry(ours, setting, "kid", values.mean().item(), "MMD^2", [len(x), len(y)], note)
    return [entry | {"values": values.tolist()}]


def cmmd(ours: Features, setting: Setting) -> list[Metric]:
    """Return 1000 x MMD² of CLIP embeddings (Jayasumana et al., arXiv:2401.09603)."""
    x, y = ours.values, setting.theirs.values
    note = {"estimator": "biased MMD^2, Gaussian kernel, normalised embeddings", "sigma": distances.SIGMA}
    note |= {"scale": distances.SCALE, "authors_features": "openai/clip-vit-large-patch14-336"}
    return [_entry(ours, setting, "cmmd", distances.cmmd(x, y), "1000 x MMD^2", [len(x), len(y)], note)]


def clip(ours: Features, setting: Setting) -> list[Metric]:
    """Return 100 x cosine of an image and its prompt, negative ones included; one value for every sound image."""
    values = 100 * distances.cosines(ours.values, of_texts(ours, setting.extractor, setting.batch_size))
    note = {"estimator": "mean of 100 x cosine, not clipped at 0", "prompt": "as it is, cut at the model's length"}
    entry = _entry(ours, setting, "clip", values.mean().item(), "100 x cosine", len(values), note)
    return [entry | {"higher_is_better": True, "against": None, "values": values.tolist()}]


def drift(ours: Features, setting: Setting) -> list[Metric]:
    """Return how far images of the same prompt and seed moved: in features and in pixels.

    One value for every pair of sound images. Raises UserError if there is none, or if their sizes differ.
    """
    there = _by_seed(setting.theirs)
    left, right = [], []  # places of the pairs among the sound images of either side
    for key, i in _by_seed(ours).items():
        if key not in there:
            continue
        j = there[key]
        if ours.sound[i].prompt != setting.theirs.sound[j].prompt:
            text = f"{ours.path / ours.sound[i].file} and {setting.against} have other prompts for one row and seed"
            raise UserError(f"{text}: generate both from the same prompts")
        left.append(i)
        right.append(j)
    if not left:
        text = f"{ours.path} and {setting.against} share no row and seed"
        raise UserError(f"{text}: drift needs images of the same prompts and seeds")
    far: list[float] = (1 - distances.cosines(ours.values[left], setting.theirs.values[right])).tolist()
    pixels = []
    for i, j in zip(left, right, strict=True):
        pixels.append(_rmse(ours, ours.sound[i], setting.theirs, setting.theirs.sound[j]))
    note = {"pairs": "equal row and seed, both images sound", "files": [ours.sound[i].file for i in left]}
    entries = []
    for name, values, unit in (("drift", far, "1 - cosine"), ("drift_rmse", pixels, "levels of 255")):
        entry = _entry(ours, setting, name, float(np.mean(values)), unit, len(left), note)
        entries.append(entry | {"values": values})
    return entries


def _by_seed(side: Features) -> dict[tuple[int | None, ...], int]:
    """Return the place of every sound image by row and seed. Raises UserError where two images share them."""
    places: dict[tuple[int | None, ...], int] = {}
    for i, entry in enumerate(side.sound):
        if places.setdefault(entry.noise, i) != i:
            text = f"{side.path} holds two images of row {entry.row} and seed {entry.seed}"
            raise UserError(f"{text}: drift needs a folder of eval.generate, where every image has its own")
    return places


def _rmse(ours: Features, one: Entry, theirs: Features, other: Entry) -> float:
    """Return the root of the mean squared difference over all pixels and channels, in levels of 255."""
    a, b = _pixels(ours, one), _pixels(theirs, other)
    if a.shape != b.shape:
        text = f"{ours.path / one.file} is {_size(a)} pixels and {theirs.path / other.file} {_size(b)}"
        raise UserError(f"{text}: drift compares images of one size, generate them alike")
    return float(np.sqrt(np.mean(np.square(a - b))))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _pixels(side: Features, entry: Entry) -> np.ndarray:
    image, _ = picture(ImageFolder(path=side.path, entries=side.entries, generation={}), entry)
    return np.asarray(image, dtype=np.float64)


FEATURES = {"clip": "CLIP", "dinov2": "DINOv2", "pocket": "pocket"}  # features, as titles call them


def titled(name: str, features: str) -> str:
    """Return what the field calls a metric: FID and KID are of InceptionV3, which is a TorchScript file here."""
    kind = FEATURES.get(features.partition(":")[0])
    if kind is None or name not in ("fid", "kid"):
        return {"cmmd": "CMMD", "clip": "CLIP score", "fid": "FID", "kid": "KID"}.get(name, name)
    return f"{'FD' if name == 'fid' else 'KD'}-{kind}"


def _entry(
    ours: Features,
    setting: Setting,
    name: str,
    value: float,
    unit: str,
    n: int | list[int | None],
    note: dict[str, Any],
) -> Metric:
    return {
        "name": name,
        "title": titled(name, setting.extractor.name),
        "value": value,
        "unit": unit,
        "higher_is_better": False,
        "n": n,
        "features": setting.extractor.name,
        "against": setting.against,
        "protocol": note
        | {"features_sha256": setting.extractor.key, "images": ours.images, "against_images": setting.images},
    }


METRICS = {"fid": fid, "kid": kid, "cmmd": cmmd, "clip": clip, "drift": drift}
