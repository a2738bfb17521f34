"""What a report is made of, read and checked: run folders of erase_sd and evaluated folders of images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from erase_sd.common.errors import UserError
from eval.images.folder import GENERATION, ImageFolder, read
from eval.images.match import headings
from eval.judges.censor import Hiding, Mask, mask
from eval.judges.protocols import NETWORKS, OLD

JUDGES = {  # file -> what it must hold, and the command that writes it
    "nudity.json": ({"n", "broken", "detector", "protocols"}, "python -m eval.nudity"),
    "quality.json": ({"n", "broken", "metrics"}, "python -m eval.quality"),
    "concepts.json": ({"n", "broken", "concepts", "UA", "IRA", "CRA", "values"}, "python -m eval.concepts"),
}


class ErasureRun(NamedTuple):
    """A run folder: its record and, where the oracle knows the concept, its scores."""

    path: Path
    record: dict[str, Any]
    scores: dict[str, Any] | None

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.resolve().name

    @property
    def concept(self) -> str:
        """Return what was erased, as the user named it."""
        concept = self.record["config"].get("concept", "not recorded")
        return ", ".join(concept) if isinstance(concept, list) else str(concept)


class ImageSet(NamedTuple):
    """A folder of images, what its evaluations found (None where there was none), and what of it is hidden."""

    folder: ImageFolder
    label: str  # what tells it from the other folders of its prompts
    name: str  # the same for all folders of the page
    hidden: Mask
    nudity: dict[str, Any] | None
    quality: dict[str, Any] | None
    concepts: dict[str, Any] | None

    @property
    def source(self) -> str:
        """Return the name of the prompts."""
        return str(self.folder.generation.get("prompts"))

    @property
    def is_baseline(self) -> bool:
        """Return whether the images are the original model's."""
        return not self.folder.generation.get("weights")


def run(path: str) -> ErasureRun:
    """Return a finished run. Raises UserError for a folder that holds none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path} is no folder: give run folders, as erase-sd writes them into --output_dir")
    record = _json(folder / "run.json")
    if record is None or not isinstance(record.get("config"), dict):
        raise UserError(f"{path} holds no finished run (no run.json with its config): finish it with erase-sd")
    scores = _json(folder / "scores.json")
    return ErasureRun(folder, record, scores)


def images(paths: tuple[str, ...], censored: bool, hide: Hiding = "whole") -> list[ImageSet]:
    """Return folders of images with their results. Raises UserError for other folders and damaged results.

    Where exposed regions of a source that may be explicit are not known yet, they are detected.
    """
    folders = [read(path) for path in paths]
    by_source: dict[str, list[ImageFolder]] = {}
    for folder in folders:
        if not folder.generation:
            raise UserError(f"{folder.path} has no {GENERATION}: give folders that eval.generate drew")
        by_source.setdefault(str(folder.generation.get("prompts")), []).append(folder)
    labels: dict[Path, str] = {}
    for group in by_source.values():
        for folder, text in zip(group, headings(group), strict=True):
            labels[folder.path] = text
    count = Counter(labels.values())
    found = []
    for folder in folders:
        label = labels[folder.path]
        name = label if count[label] == 1 else f"{label}, {folder.generation.get('prompts')}"
        results = [_result(folder.path, file) for file in JUDGES]
        found.append(ImageSet(folder, label, name, mask(folder, censored, hide), *results))
    return found


def _result(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what one evaluation wrote, None if it was not run. Raises UserError if it is damaged."""
    keys, command = JUDGES[name]
    if name == "nudity.json":
        name = _nudity(folder)
    result = _json(folder / name)
    if result is None:
        return None
    missing = keys - result.keys()
    if missing:
        raise UserError(f"{folder / name} lacks {', '.join(sorted(missing))}: write it again with {command}")
    return result


def _nudity(folder: Path) -> str:
    """Return the file of the counts on the network of the papers, where --detector gave it, or else nudity.json."""
    of_papers = sorted(folder.glob(f"nudity.*-{NETWORKS[OLD].sha256[:16]}-*-{NETWORKS[OLD].recipe}.json"))
    return of_papers[0].name if of_papers else "nudity.json"


def _json(file: Path) -> dict[str, Any] | None:
    """Return the dict in a file, None if there is no file. Raises UserError if it is damaged."""
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): write it again") from error
