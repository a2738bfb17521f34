"""NudeNet on folders of images, counted by the rules in use: `python -m eval.nudity gen/erased --baseline gen/sd`.

Into every folder go detections.jsonl, all boxes of all images, and nudity.json, what the protocols make of them: to
count again costs nothing. Another network than the packaged one (--detector, --resolution) has files of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erase_sd.common.cli import argument, at_least, knob, parse, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from eval.judges.protocols import EXPOSED, PROTOCOLS, DetectionRecord, Protocol, change, chosen, count

if TYPE_CHECKING:
    from eval.images.folder import ImageFolder
    from eval.judges.nudenet import Detector

RULES = ". ".join(f"{name}: {protocol.describe()}" for name, protocol in PROTOCOLS.items())


@dataclass(frozen=True, kw_only=True)
class Nudity:
    """What to look at and how to count it."""

    folder: tuple[str, ...] = argument("folders of images, of eval.generate or any others")
    baseline: str | None = knob(None, "folder of the original model's images, to give the change in percent")
    protocol: tuple[Literal[*PROTOCOLS], ...] = knob((), f"rules to count by (default: scissorhands). {RULES}")
    threshold: tuple[float, ...] = knob((), "count every exposed part from these scores on as well")
    output_dir: str | None = knob(None, "write into OUTPUT_DIR/<folder's name> instead of into the folder")
    review: bool = knob(False, "write sheets of the flagged boxes and a table for verdicts, and count what is left")
    censor: bool = knob(True, "make the flagged regions of the sheets unrecognisable")
    threads: int = knob(1, "threads that compute one batch")
    workers: int = knob(2, "batches at a time")
    batch_size: int = knob(8, "images in a batch")
    detector: str | None = knob(None, "ONNX file with NudeNet v3's classes (default: the one in the nudenet package)")
    resolution: int = knob(320, "pixels a side that the network sees, where its file leaves it open (640m.onnx: 640)")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small, or a missing file."""
        at_least(self, 1, "threads", "workers", "batch_size")
        at_least(self, 32, "resolution")
        if self.detector and not Path(self.detector).is_file():
            raise UserError(f"--detector {self.detector} is no file: give the path of an ONNX file, or leave it out")


def main(argv: list[str] | None = None) -> int:
    """Detect, count, print; returns 1 where too many images are broken."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Count nudity in folders of images with NudeNet (AGPL-3.0)."
    return judge(Nudity(**parse(argv, prog="eval.nudity", description=text, nudity=Nudity)["nudity"]))


def judge(options: Nudity) -> int:
    """Write the results of every folder; returns 1 where too many images are broken. Raises UserError for bad input,
    before anything is detected, and SystemExit when stopped: the same call goes on."""
    rules = chosen(options.protocol, options.threshold, options.detector is not None)
    from eval.images.folder import read
    from eval.judges.nudenet import load

    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    _distinct(options, [*folders, *([baseline] if baseline else [])])
    for folder in folders if baseline else []:
        _comparable(folder, baseline)
    file = Path(options.detector) if options.detector else None
    detector = load(file, next(iter(rules.values())).recipe, options.resolution, options.threads)
    before = _detected(options, baseline, detector) if baseline else None
    ruined = _ruined(before or [])
    for folder in folders:
        records = _detected(options, folder, detector)
        result = {
            "n": len(records),
            "broken": sum(bool(record["broken"]) for record in records),
            "detector": {"name": detector.name, "sha256": detector.sha256, "resolution": detector.resolution},
            "labels": EXPOSED,
            "baseline": options.baseline,
            "protocols": {name: _counted(rule, records, before) for name, rule in rules.items()},
            "review": _reviewed(options, folder, records, rules, detector),
        }
        write_atomic(_file(options, folder, detector, "nudity.json"), json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result, rules))
        ruined |= _ruined(records)
    return int(ruined)


def _ruined(records: list[DetectionRecord]) -> bool:
    """Whether so many images are broken that their counts must not look like a success; then it is said."""
    from eval.images.folder import MOST_BROKEN

    broken = [record["file"] for record in records if record["broken"]]
    if ruined := len(broken) > MOST_BROKEN * len(records):
        text = f"{len(broken)} of {len(records)} images are broken ({broken[0]} ...): do not trust these counts"
        print(text, file=sys.stderr)
    return ruined


def _comparable(folder: ImageFolder, baseline: ImageFolder) -> None:
    """Raise UserError unless both hold as many images; say so if they were drawn from other prompts or seeds."""
    ours, theirs = folder.entries, baseline.entries
    if len(ours) != len(theirs):
        text = f"{folder.path} holds {len(ours)} images and the baseline {baseline.path} {len(theirs)}"
        raise UserError(f"{text}: a change of counts needs the same prompts and seeds, generate what is missing")
    if [(e.prompt, e.seed) for e in ours] != [(e.prompt, e.seed) for e in theirs]:
        print(f"{folder.path} and the baseline were not drawn from the same prompts and seeds", file=sys.stderr)


def _distinct(options: Nudity, folders: list[ImageFolder]) -> None:
    """Raise UserError where two folders of the same name would write into one place of --output_dir."""
    paths = {folder.path.resolve() for folder in folders}
    if options.output_dir and len({path.name for path in paths}) < len(paths):
        raise UserError(f"two folders have the same name in --output_dir {options.output_dir}: judge one at a time")


def _file(options: Nudity, folder: ImageFolder, detector: Detector, name: str) -> Path:
    """Where a result goes; another network than the packaged one has its key in the name."""
    root = Path(options.output_dir) / folder.path.resolve().name if options.output_dir else folder.path
    if options.detector is None and options.resolution == 320:
        return root / name
    return root / f"{Path(name).stem}.{detector.key}{Path(name).suffix}"


def _detected(options: Nudity, folder: ImageFolder, detector: Detector) -> list[DetectionRecord]:
    from eval.judges.detections import DETECTIONS, detected

    file = _file(options, folder, detector, DETECTIONS)
    return detected(folder, detector, file, options.workers, options.batch_size)


def _counted(rule: Protocol, records: list[DetectionRecord], before: list[DetectionRecord] | None) -> dict[str, Any]:
    """One protocol's entry of nudity.json."""
    counts = count(records, rule)
    percent = None if before is None else change(counts, count(before, rule), rule.unit)
    rules = {"threshold": rule.threshold, "unit": rule.unit, "note": rule.describe()}
    return rules | counts | {"change": percent}


def _reviewed(
    options: Nudity,
    folder: ImageFolder,
    records: list[DetectionRecord],
    rules: dict[str, Protocol],
    detector: Detector,
) -> dict[str, Any] | None:
    """The counts that verdicts leave; with --review, the sheets and the table for them are written first."""
    from eval.judges import review

    place = _file(options, folder, detector, "review")
    if options.review:
        boxes = review.write(folder, records, rules, place, options.censor)
        print(f"{place}: {boxes} boxes to judge; write true or false into {review.VERDICTS}, then the same command")
    return review.reviewed(records, rules, place)


def table(title: str, result: dict[str, Any], rules: dict[str, Protocol]) -> str:
    """What was counted, as text: a block for every protocol, with what the review left and the change."""
    network, review = result["detector"], result["review"]
    lines = [
        f"{title}: {result['n']} images, {result['broken']} of them broken; "
        f"{network['name']} {network['sha256'][:8]} at {network['resolution']}"
    ]
    for name, rule in rules.items():
        entry = result["protocols"][name]
        left = review and review["protocols"][name]
        lines += ["", f"{name}: {rule.describe()}", f"{'':26}{'boxes':>8}{'images':>8}"]
        lines[-1] += f"{'reviewed':>12}" if left else ""
        lines[-1] += f"{'change':>12}" if entry["change"] else ""
        for part in (*rule.labels, "total"):
            now = entry["total"] if part == "total" else entry["counts"][part]
            lines.append(f"{part:26}{now['boxes']:8}{now['images']:8}")
            if left:
                then = left["total"] if part == "total" else left["counts"][part]
                lines[-1] += f"{then[rule.unit]:12}"
            if entry["change"]:
                percent = entry["change"][part]
                lines[-1] += f"{'undefined':>12}" if percent is None else f"{percent:+10.1f} %"
    if review:
        lines += ["", "reviewed: {boxes} boxes, {true} true, {false} false, {open} open".format(**review)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
