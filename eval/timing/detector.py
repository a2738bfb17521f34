"""Images a second of this package's NudeNet against the package's own detector.

(a) is what the authors' evaluator does, a detector made anew for every image; (b) reuses one. Both, and ours, read the
same PNG files.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from erase_sd.common.errors import UserError
from eval.images.folder import Entry, ImageFolder, picture, read
from eval.judges.detections import detected
from eval.judges.nudenet import Detector, load, reference
from eval.timing.clock import Ways, interleaved
from eval.timing.settings import DetectorTiming, TimingSuite


def lines(suite: TimingSuite, sizes: DetectorTiming) -> Iterator[str]:
    """Yield the table of rates, and their ratios to both ways of using nudenet."""
    if importlib.util.find_spec("nudenet") is None:
        yield "detector: left out, nudenet is not installed: pip install nudenet, or the extra eval"
        return
    with tempfile.TemporaryDirectory() as root:
        paths = _made(Path(root), sizes.images) if sizes.folder is None else _some(sizes)
        yield from table(measured(paths, suite, sizes), len(paths))


def measured(paths: list[Path], suite: TimingSuite, sizes: DetectorTiming) -> dict[str, float]:
    """Return {way: images a second}, the median over the rounds after one image each to warm up."""
    make = reference()
    one, two = load(threads=1), load(threads=2)
    ways: dict[str, Callable[[list[Path]], object]] = {
        "(a) nudenet, made anew for every image": partial(_anew, make),
        "(b) nudenet, one reused": partial(_reused, make()),
        "ours, 1 worker of 1 thread": partial(_ours, one, 1, sizes.batch_size),
        "ours, 1 worker of 2 threads": partial(_ours, two, 1, sizes.batch_size),
        "ours, 2 workers of 1 thread (default)": partial(_ours, one, 2, sizes.batch_size),
    }
    timed: Ways = {}
    for name, way in ways.items():
        way(paths[:1])
        timed[name] = partial(way, paths)
    rates = {}
    for name, seconds in interleaved(timed, suite.rounds).items():
        rates[name] = len(paths) / median(seconds)
    return rates


def _anew(make: Callable[[], Any], paths: list[Path]) -> None:
    for path in paths:
        make().detect(str(path))


def _reused(detector: Any, paths: list[Path]) -> None:
    for path in paths:
        detector.detect(str(path))


def _ours(detector: Detector, workers: int, batch_size: int, paths: list[Path]) -> None:
    """Do all that eval.nudity does for an image: read, hash, check, detect and store."""
    entries = [Entry(file=path.name) for path in paths]
    folder = ImageFolder(path=paths[0].parent, entries=entries, generation={})
    with tempfile.TemporaryDirectory() as root:
        detected(folder, detector, Path(root, "detections.jsonl"), workers, batch_size)


def table(rates: dict[str, float], n: int) -> Iterator[str]:
    """Yield the rates, and their ratios to both ways of using nudenet."""
    a, b, *_ = rates.values()
    yield f"detector: {n} images a round{'images/s':>26}{'/ (a)':>8}{'/ (b)':>8}"
    for name, rate in rates.items():
        yield f"detector: {name:40}{rate:>8.3f}{rate / a:>8.2f}{rate / b:>8.2f}"


def _some(sizes: DetectorTiming) -> list[Path]:
    """Return the first sound images of a folder. Raises UserError if there is none."""
    folder = read(sizes.folder)
    sound = []
    for entry in folder.entries[: sizes.images]:
        _, reason = picture(folder, entry)
        if not reason:
            sound.append(folder.path / entry.file)
    if not sound:
        raise UserError(f"--folder {sizes.folder} begins with {sizes.images} broken images: give another folder")
    return sound


def _made(root: Path, count: int) -> list[Path]:
    """Write PNG files that are as much work to read as photographs: smooth shapes and a little noise."""
    draw = np.random.default_rng(0)
    paths = []
    for index in range(count):
        path = root / f"{index:05}.png"
        shapes = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((512, 512))
        noise = draw.integers(-4, 5, (512, 512, 3))
        Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths
