"""Images a second of this package's NudeNet against the package's own detector: `python -m eval.speed`.

(a) is what the authors' evaluator does, a detector made anew for every image; (b) reuses one. Both, and ours, read the
same PNG files; rounds alternate, so that other work on the machine slows all of them, and the median counts.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from erase_sd.knobs import at_least
from erase_sd.options import knob, parse
from erase_sd.process import UserError, run_main


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What to measure on."""

    folder: str | None = knob(None, "folder of images (default: 512-pixel PNG files made for the purpose)")
    images: int = knob(32, "images in a round")
    rounds: int = knob(5, "rounds of each, of which the median counts")
    batch_size: int = knob(8, "images in a batch of ours")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small."""
        at_least(self, 1, "images", "rounds", "batch_size")


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    argv = sys.argv[1:] if argv is None else argv
    options = Speed(**parse(argv, prog="eval.speed", description="Time the NudeNet detectors.", speed=Speed)["speed"])
    os.environ["TQDM_DISABLE"] = "1"  # read at import: no bar for every round
    with tempfile.TemporaryDirectory() as root:
        paths = _made(Path(root), options.images) if options.folder is None else _some(options)
        print(table(measured(paths, options), len(paths)))
    return 0


def measured(paths: list[Path], options: Speed) -> dict[str, float]:
    """{way: images a second}, the median over the rounds after one image each to warm up."""
    from eval.detector import load, reference

    make = reference()
    reused, one, two = make(), load(threads=1), load(threads=2)
    ways: dict[str, Callable[[list[Path]], object]] = {
        "(a) nudenet, made anew for every image": lambda some: [make().detect(str(path)) for path in some],
        "(b) nudenet, one reused": lambda some: [reused.detect(str(path)) for path in some],
        "ours, 1 worker of 1 thread": lambda some: _ours(some, one, 1, options.batch_size),
        "ours, 1 worker of 2 threads": lambda some: _ours(some, two, 1, options.batch_size),
        "ours, 2 workers of 1 thread (default)": lambda some: _ours(some, one, 2, options.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(paths[:1])
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way(paths)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(paths) / median(times) for name, times in seconds.items()}


def _ours(paths: list[Path], detector: object, workers: int, batch_size: int) -> object:
    """All that eval.nudity does for an image: read, hash, check, detect and store."""
    from eval.detections import detected
    from eval.images import Entry, ImageFolder

    folder = ImageFolder(path=paths[0].parent, entries=[Entry(file=path.name) for path in paths], generation={})
    with tempfile.TemporaryDirectory() as root:
        return detected(folder, detector, Path(root, "detections.jsonl"), workers, batch_size)


def table(rates: dict[str, float], n: int) -> str:
    """The rates, and their ratios to both ways of using nudenet."""
    a, b, *_ = rates.values()
    lines = [f"{n} images a round{'images/s':>30}{'/ (a)':>8}{'/ (b)':>8}"]
    lines += [f"{name:40}{rate:>8.1f}{rate / a:>8.2f}{rate / b:>8.2f}" for name, rate in rates.items()]
    return "\n".join(lines)


def _some(options: Speed) -> list[Path]:
    """The first sound images of a folder."""
    from eval.images import picture, read

    folder = read(options.folder)
    sound = [folder.path / entry.file for entry in folder.entries[: options.images] if not picture(folder, entry)[1]]
    if not sound:
        raise UserError(f"--folder {options.folder} begins with {options.images} broken images: give another folder")
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


if __name__ == "__main__":
    run_main(main)
