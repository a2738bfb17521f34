"""What the detector saw, stored once: detections.jsonl of a folder of images, one line an image.

    {"file", "sha256", "width", "height", "detections": [{"class", "score", "box": [x, y, width, height]}], "broken",
     "detector"}

Boxes are in pixels of the upright image. A line is written as soon as its batch is through and found again by the
image's sha256 and the detector's key, so that nothing is detected twice; a complete file is in the manifest's order. A
broken image has a line without detections that says why.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TextIO

import numpy as np
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest, write_atomic
from erase_sd.common.signals import StopFlag
from eval.images.folder import Entry, ImageFolder, picture
from eval.judges.nudenet import Detector, detect
from eval.judges.protocols import EXPOSED, RECIPES, DetectionRecord, check_threshold

DETECTIONS = "detections.jsonl"
FIELDS = ("file", "sha256", "detections", "broken", "detector")  # what every line has


def detected(
    folder: ImageFolder, detector: Detector, file: Path, workers: int, batch_size: int
) -> list[DetectionRecord]:
    """Return the records of every image, in the folder's order; those that `file` lacks are detected and added to it.

    `workers` threads take a batch each. Raises UserError if `file` is damaged or cannot be written, and SystemExit
    with 128 + signal when stopped: the same call goes on.
    """
    old = stored(file)
    known = {record["sha256"]: record for record in old if record["detector"] == detector.key}
    if file.exists() and not file.read_bytes().endswith(b"\n"):  # a killed process left half a line
        write_atomic(file, _lines(old))
    records: dict[str, DetectionRecord] = {}
    total, name = len(folder.entries), str(folder.path)
    pool = ThreadPoolExecutor(workers)
    try:
        with (
            _appending(file) as out,
            StopFlag() as stop,
            tqdm(total=total, desc=name, unit="image") as bar,
        ):
            futures = []
            for start in range(0, total, batch_size):
                batch = folder.entries[start : start + batch_size]
                futures.append(pool.submit(_batch, folder, batch, detector, known))
            for future in as_completed(futures):
                if not future.cancelled():
                    done = future.result()
                    out.write(_lines([record for record in done if record["sha256"] not in known]))
                    out.flush()
                    for record in done:
                        records[record["file"]] = record
                    bar.update(len(done))
                if stop.is_set():
                    _cancel(futures)
    finally:
        pool.shutdown(cancel_futures=True)
    if len(records) < total:
        text = f"stopped: {len(records)} of {total} images of {folder.path} are done"
        print(f"{text}; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stop.signum)
    ordered = [records[entry.file] for entry in folder.entries]
    if ordered != old:
        write_atomic(file, _lines(ordered))
    return ordered


def _appending(file: Path) -> TextIO:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return open(file, "a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}): name a folder with --output_dir") from error


def _cancel(futures: list[Future]) -> None:
    for future in futures:
        future.cancel()  # does nothing to the running ones, whose results are kept


def _lines(records: list[DetectionRecord]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _batch(
    folder: ImageFolder, entries: list[Entry], detector: Detector, known: dict[str, DetectionRecord]
) -> list[DetectionRecord]:
    """Return the records of some images, known or new."""
    records, images, fresh = [], [], []
    for entry in entries:
        path = folder.path / entry.file
        sha256 = file_digest(path) if path.is_file() else None
        if sha256 in known:
            broken = entry.broken or known[sha256]["broken"]
            records.append(known[sha256] | {"file": entry.file, "broken": broken})
            continue
        image, broken = pixels(folder, entry)
        high, wide = (None, None) if image is None else image.shape[:2]
        record = {
            "file": entry.file,
            "sha256": sha256,
            "width": wide,
            "height": high,
            "detections": [],
            "broken": broken,
            "detector": detector.key,
        }
        records.append(record)
        if not broken:
            images.append(image)
            fresh.append(record)
    for record, found in zip(fresh, detect(detector, images), strict=True):
        record["detections"] = found
    return records


def stored(file: Path) -> list[DetectionRecord]:
    """Return the lines of detections.jsonl, none if there is no file.

    Half a line that a killed process left is dropped. Raises UserError naming a line that is none.
    """
    if not file.is_file():
        return []
    records = []
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
    if not whole:
        return []
    for number, line in enumerate(whole.split("\n"), start=1):
        try:
            record = json.loads(line)
            for name in FIELDS:
                record[name]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file}, line {number} is no detection ({error!r}): remove the file and detect again"
            ) from error
        records.append(record)
    return records


def flagged(folder: ImageFolder, threshold: float) -> dict[str, list[list[int]]]:
    """Return {file: boxes} of what detections.jsonl shows exposed from the threshold on; {} if there is no such file.

    Raises UserError where it cannot answer: a threshold below what is stored, or images that are missing in it or were
    changed since, whose boxes would be those of other pictures.
    """
    records = {record["file"]: record for record in stored(folder.path / DETECTIONS)}
    if not records:
        return {}
    check_threshold(threshold, RECIPES["nudenet"].floor)
    boxes: dict[str, list[list[int]]] = {}
    for entry in folder.entries:
        record = records.get(entry.file)
        path = folder.path / entry.file
        sha256 = entry.sha256 or (file_digest(path) if path.is_file() else None)
        if record is None or record["sha256"] != sha256:
            raise UserError(
                f"{folder.path / DETECTIONS} does not know {entry.file}: python -m eval.nudity {folder.path}"
            )
        for found in record["detections"]:
            if found["class"] in EXPOSED and found["score"] >= threshold:
                boxes.setdefault(entry.file, []).append(found["box"])
    return boxes


def pixels(folder: ImageFolder, entry: Entry) -> tuple[np.ndarray | None, str | None]:
    """Return (height, width, 3) bytes in the order B, G, R, upright, or None, and why the image is broken or None.

    The pixels are those of cv2.imread, which nudenet reads with: equal on PNG, JPEG and WebP, to one level on CMYK.
    Unlike it, Pillow tells a truncated file from a whole one.
    """
    image, reason = picture(folder, entry)
    if image is None:
        return None, reason
    return np.asarray(image)[:, :, ::-1], reason
