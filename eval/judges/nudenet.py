"""NudeNet on many images: its packaged network between steps of our own, which are vectorised and take any threads.

    detector = load()                   # the network inside the nudenet package, or another file with its classes
    detect(detector, [image, ...])      # box for box what nudenet.NudeDetector.detect answers for their files

Box for box as nudenet 3.4.2 on its 320n.onnx, and as nudenet 3.0.8 on its best.onnx, whatever package is installed: a
file's hash decides how it is read.

The package is imported here and nowhere else, and only when it is needed: its wheel is AGPL-3.0 (extra `eval`).
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest
from eval.judges.protocols import RECIPES, Recipe, network_of, recipe_of

# The order of NudeNet v3's classes, which its packaged file states in its metadata (`names`).
LABELS = (
    *("FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED"),
    *("FEMALE_GENITALIA_EXPOSED", "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED"),
    *("FEET_COVERED", "ARMPITS_COVERED", "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED"),
    *("ANUS_COVERED", "FEMALE_BREAST_COVERED", "BUTTOCKS_COVERED"),
)
RESOLUTION = 320  # pixels a side of the square that the packaged network sees


@dataclass(frozen=True, kw_only=True)
class Detector:
    """An open network and all that its answers depend on."""

    session: Any  # onnxruntime.InferenceSession
    name: str  # of its file, without suffix
    sha256: str
    network: str  # which published one it is, as `network_of` says
    resolution: int  # pixels a side
    one_by_one: bool  # the file fixes a batch of one
    labels: tuple[str, ...]
    recipe: Recipe
    key: str  # what tells its detections from another detector's


def load(
    file: Path | None = None, recipe: str | None = None, resolution: int = RESOLUTION, threads: int = 1
) -> Detector:
    """Open the packaged network, or `file`, and try it on a black image.

    `recipe` is of RECIPES, by default the one of the file's hash; `resolution` is for files that leave it open;
    `threads` compute one batch. Raises UserError if nudenet is not
    installed, or if the file is no such network.
    """
    path = file or packaged()
    session, answer = _opened(path, resolution, threads)
    if answer.ndim != 3 or answer.shape[1] != 4 + len(LABELS):
        shape = " x ".join(map(str, answer.shape))
        raise UserError(
            f"--detector {path} answers {shape}, not 1 x {4 + len(LABELS)} x boxes: give a NudeNet v3 file"
        )
    digest, name, side = file_digest(path), path.stem, _side(session, resolution)
    recipe = recipe or recipe_of(digest)
    return Detector(
        session=session,
        name=name,
        sha256=digest,
        network=network_of(digest),
        resolution=side,
        one_by_one=session.get_inputs()[0].shape[0] == 1,
        labels=_labels(session.get_modelmeta().custom_metadata_map),
        recipe=RECIPES[recipe],
        key=f"{name}-{digest[:16]}-{side}-{recipe}",
    )


def _opened(path: Path, resolution: int, threads: int) -> tuple[Any, np.ndarray]:
    """Return the session of an ONNX file and its answer to a black image. Raises UserError if it cannot be run."""
    _nudenet()  # onnxruntime and cv2 come with it
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.log_severity_level = 4  # what it has to say of a file that it refuses is in the exception
    refused = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile)
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        side = _side(session, resolution)
        return session, _run(session, np.zeros((1, 3, side, side), np.float32))
    except (*refused, state.RuntimeException, state.NotImplemented, ValueError, IndexError) as error:
        raise UserError(
            f"--detector {path} is no detector that onnxruntime can run ({error}): give another"
        ) from error


def _side(session: Any, resolution: int) -> int:
    """Return the pixels a side of the network's input: what its file fixes, or else `resolution`."""
    fixed = session.get_inputs()[0].shape[2]
    return fixed if isinstance(fixed, int) else resolution


def packaged() -> Path:
    """Return the network inside the nudenet package. Raises UserError if it is not installed."""
    place = Path(_nudenet().__file__).parent
    old = place / "best.onnx"  # of 2023
    return old if old.is_file() else place / "320n.onnx"


def reference() -> Any:
    """Return `nudenet.NudeDetector`, which `eval.speed` measures against."""
    return _nudenet().NudeDetector


def _nudenet() -> Any:
    try:
        import nudenet
    except ImportError as error:
        text = "NudeNet is not installed: pip install 'erase-sd[eval]' (its wheel is AGPL-3.0)"
        raise UserError(text) from error
    return nudenet


def _labels(metadata: dict[str, str]) -> tuple[str, ...]:
    """Return the classes in the order that the file states; files that state none of ours are in NudeNet's order."""
    names = ast.literal_eval(metadata.get("names", "{}"))
    stated = tuple(label for _, label in sorted(names.items()))
    return stated if sorted(stated) == sorted(LABELS) else LABELS


def detect(detector: Detector, images: list[np.ndarray]) -> list[list[dict[str, Any]]]:
    """Return the detections of (height, width, 3) BGR images, highest score first.

    A detection is {"class", "score", "box": [x, y, width, height] in pixels}.
    """
    if not images:
        return []
    blob = _blob([_shrunk(image, detector) for image in images], detector.recipe)
    parts = np.split(blob, len(blob)) if detector.one_by_one else [blob]
    answers = np.concatenate([_run(detector.session, part) for part in parts])
    found = []
    for answer, image in zip(answers, images, strict=True):
        high, wide = image.shape[:2]
        found.append(_boxes(answer, high, wide, detector))
    return found


def _run(session: Any, blob: np.ndarray) -> np.ndarray:
    """Map (n, 3, side, side) in [0, 1] to (n, 4 + classes, anchors): centre, size, and a score for every class."""
    return session.run(None, {session.get_inputs()[0].name: blob})[0]


def _shrunk(image: np.ndarray, detector: Detector) -> np.ndarray:
    """Return (side, side, 3) bytes of the image as the network sees it."""
    import cv2

    high, wide = image.shape[:2]
    side = detector.resolution
    if detector.recipe.fit == "middle":
        inner = _inner(high, wide, side)
        above, before = (side - inner[1]) // 2, (side - inner[0]) // 2
        image = cv2.resize(image, inner, interpolation=cv2.INTER_LINEAR)
        # as much below as above, so that an odd rest leaves one line too few, which is then stretched
        image = cv2.copyMakeBorder(image, above, above, before, before, cv2.BORDER_CONSTANT)
    elif detector.recipe.fit == "corner" and high != wide:
        longest = max(high, wide)
        image = cv2.copyMakeBorder(image, 0, longest - high, 0, longest - wide, cv2.BORDER_CONSTANT)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def _inner(high: int, wide: int, side: int) -> tuple[int, int]:
    """Return width and height of the picture within the square, its longer side being the square's."""
    if high > wide:
        return max(1, round(side * (wide / high))), side
    return side, max(1, round(side / (wide / high)))


def _blob(images: list[np.ndarray], recipe: Recipe) -> np.ndarray:
    """Return (n, 3, side, side) float32 in [0, 1]."""
    import cv2

    return cv2.dnn.blobFromImages(images, 1 / 255, swapRB=recipe.rgb)


def _boxes(answer: np.ndarray, high: int, wide: int, detector: Detector) -> list[dict[str, Any]]:
    """Return the detections of one image from (4 + classes, anchors), the network's answer."""
    import cv2

    recipe = detector.recipe
    best = answer[4:].max(0)
    kept = np.flatnonzero(best > recipe.floor)
    if not len(kept):
        return []
    scores = best[kept].tolist()
    placed = _rounded if recipe.fit == "middle" else _clipped
    boxes = placed(answer[:2, kept], answer[2:4, kept], high, wide, detector)
    classes = answer[4:, kept].argmax(0)
    found = []
    for i in cv2.dnn.NMSBoxes(boxes, scores, recipe.floor, recipe.overlap):
        box = [int(value) for value in boxes[i]]
        found.append({"class": detector.labels[classes[i]], "score": scores[i], "box": box})
    return found


def _clipped(centre: np.ndarray, extent: np.ndarray, high: int, wide: int, detector: Detector) -> list[list[float]]:
    """Return [x, y, width, height] in pixels from (2, n) centres and extents in the square, within the picture.

    In float32 and in nudenet's order of operations: a box is cut off to whole pixels, where the last bit decides.
    """
    size = np.array([[wide], [high]], np.float32)
    seen = size.max() if detector.recipe.fit == "corner" else size  # pixels that fill the network's square
    corner = np.clip((centre - extent / 2) * seen / detector.resolution, 0, size)
    extent = np.minimum(extent * seen / detector.resolution, size - corner)
    return np.concatenate([corner, extent]).T.tolist()


def _rounded(centre: np.ndarray, extent: np.ndarray, high: int, wide: int, detector: Detector) -> list[list[int]]:
    """Return the same for a picture in the middle of the square: whole pixels, which may stick out of the picture.

    In float32 and in the order of nudenet 3.0.8, which takes one factor, of the diagonals, for both axes.
    """
    inner = _inner(high, wide, detector.resolution)
    factor = np.float32(math.sqrt((wide**2 + high**2) / (inner[0] ** 2 + inner[1] ** 2)))
    before = np.array([[(detector.resolution - side) // 2] for side in inner], np.float32)
    corner = (centre - extent * np.float32(0.5) - before) * factor
    return np.rint(np.concatenate([corner, extent * factor])).astype(int).T.tolist()
