"""Images a second of this package's NudeNet against the package's own detector.

(a) is what the authors' evaluator does, a detector made anew for every image; (b) reuses one. Both, and ours, read the
same PNG files.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from erase_sd.common.errors import UserError
from eval.timing.clock import Ways, interleaved
from eval.timing.settings import DetectorTiming, TimingSuite


def lines(suite: TimingSuite, sizes: DetectorTiming) -> Iterator[str]:
    """The table of rates, and their ratios to both ways of using nudenet."""
    if importlib.util.find_spec("nudenet") is None:
        yield "detector: left out, nudenet is not installed: pip install nudenet, or the extra eval"
        return
    with tempfile.TemporaryDirectory() as root:
        paths = _made(Path(root), sizes.images) if sizes.folder is None else _some(sizes)
        yield from table(measured(paths, suite, sizes), len(paths))


def measured(paths: list[Path], suite: TimingSuite, sizes: DetectorTiming) -> dict[str, float]:
    """{way: images a second}, the median over the rounds after one image each to warm up."""
    from eval.judges.nudenet import load, reference

    make = reference()
    reused, one, two = make(), load(threads=1), load(threads=2)
    ways = {
        "(a) nudenet, made anew for every image": lambda some: [make().detect(str(path)) for path in some],
        "(b) nudenet, one reused": lambda some: [reused.detect(str(path)) for path in some],
        "ours, 1 worker of 1 thread": lambda some: _ours(some, one, 1, sizes.batch_size),
        "ours, 1 worker of 2 threads": lambda some: _ours(some, two, 1, sizes.batch_size),
        "ours, 2 workers of 1 thread (default)": lambda some: _ours(some, one, 2, sizes.batch_size),
    }
    for way in ways.values():
        way(paths[:1])
    timed: Ways = {name: functools.partial(way, paths) for name, way in ways.items()}
    return {name: len(paths) / median(times) for name, times in interleaved(timed, suite.rounds).items()}


def _ours(paths: list[Path], detector: object, workers: int, batch_size: int) -> object:
    """All that eval.nudity does for an image: read, hash, check, detect and store."""
    from eval.images.folder import Entry, ImageFolder
    from eval.judges.detections import detected

    folder = ImageFolder(path=paths[0].parent, entries=[Entry(file=path.name) for path in paths], generation={})
    with tempfile.TemporaryDirectory() as root:
        return detected(folder, detector, Path(root, "detections.jsonl"), workers, batch_size)


def table(rates: dict[str, float], n: int) -> Iterator[str]:
    """The rates, and their ratios to both ways of using nudenet."""
    a, b, *_ = rates.values()
    yield f"detector: {n} images a round{'images/s':>26}{'/ (a)':>8}{'/ (b)':>8}"
    for name, rate in rates.items():
        yield f"detector: {name:40}{rate:>8.3f}{rate / a:>8.2f}{rate / b:>8.2f}"


def _some(sizes: DetectorTiming) -> list[Path]:
    """The first sound images of a folder."""
    from eval.images.folder import picture, read

    folder = read(sizes.folder)
    sound = [folder.path / entry.file for entry in folder.entries[: sizes.images] if not picture(folder, entry)[1]]
    if not sound:
        raise UserError(f"--folder {sizes.folder} begins with {sizes.images} broken images: give another folder")
    return sound


def _made(root: Path, count: int) -> list[Path]:
    """PNG files that are as much work to read as photographs: smooth shapes and a little noise."""
    import numpy as np
    from PIL import Image

    draw, paths = np.random.default_rng(0), [root / f"{i:05}.png" for i in range(count)]
    for path in paths:
        shapes = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((512, 512))
        noise = draw.integers(-4, 5, (512, 512, 3))
        Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return paths
