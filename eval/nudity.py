"""NudeNet on folders of images, counted by the rules in use: `python -m eval.nudity gen/erased --baseline gen/sd`.

Into every folder go detections.jsonl, all boxes of all images, and nudity.json, what the protocols make of them: to
count again costs nothing. Another network than the packaged one (--detector, --resolution) has files of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from erase_sd.common.cli import argument, at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import file_digest, write_atomic
from eval.images.folder import Entry, ImageFolder, count_broken, read, warn_if_broken
from eval.judges import review
from eval.judges.detections import DETECTIONS, detected
from eval.judges.nudenet import Detector, load
from eval.judges.protocols import (
    EXPOSED,
    PROTOCOLS,
    DetectionRecord,
    Protocol,
    caution,
    change,
    chosen,
    count,
    count_people,
    network_of,
    paired,
)

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
    detector: str | None = knob(
        None,
        "ONNX file with NudeNet v3's classes (default: that of the nudenet package). scissorhands, mace and spm were "
        "counted on best.onnx of nudenet 3.0.8 (pip download nudenet==3.0.8 --no-deps, then unzip)",
    )
    resolution: int = knob(320, "pixels a side that the network sees, where its file leaves it open (640m.onnx: 640)")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small, or a missing file."""
        at_least(self, 1, "threads", "workers", "batch_size")
        at_least(self, 32, "resolution")
        if self.detector and not Path(self.detector).is_file():
            raise UserError(f"--detector {self.detector} is no file: give the path of an ONNX file, or leave it out")


def rules_of(options: Nudity) -> dict[str, Protocol]:
    """Return the rules to count by. Raises UserError where they need another network than the given one."""
    given = network_of(file_digest(Path(options.detector))) if options.detector else None
    return chosen(options.protocol, options.threshold, given)


def judge(options: Nudity) -> int:
    """Write and print the results of every folder; returns 1 where too many images are broken."""
    _, any_broken = counted(options)
    return int(any_broken)


def counted(options: Nudity) -> tuple[list[dict[str, Any]], bool]:
    """Write and print the results; return them, and whether too many images are broken, the baseline's included.

    Raises UserError for bad input, before anything is detected, and SystemExit when stopped: the same call goes on.
    """
    file = Path(options.detector) if options.detector else None
    rules = rules_of(options)
    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    _distinct(options, folders, baseline)
    alike = [baseline is not None and _comparable(folder, baseline) for folder in folders]
    detector = load(file, next(iter(rules.values())).recipe, options.resolution, options.threads)
    before = None
    results: list[dict[str, Any]] = []
    any_broken = False
    if baseline:
        before = _detected(options, baseline, detector)
        any_broken = warn_if_broken(_entries(before), baseline.path)
    for folder, same_pictures in zip(folders, alike, strict=True):
        records = _detected(options, folder, detector)
        result = {
            "n": len(records),
            "broken": count_broken(_entries(records)),
            "detector": {"name": detector.name, "sha256": detector.sha256, "resolution": detector.resolution},
            "network": {"name": detector.network, "caution": caution(rules, detector.network)},
            "labels": EXPOSED,
            "baseline": options.baseline,
            "people": _people(records, before),
            "protocols": {name: _counted(rule, records, before, same_pictures) for name, rule in rules.items()},
            "review": _reviewed(options, folder, records, rules, detector),
        }
        write_atomic(_file(options, folder, detector, "nudity.json"), json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result, rules))
        results.append(result)
        any_broken |= warn_if_broken(_entries(records), folder.path)
    return results, any_broken


def _people(records: list[DetectionRecord], before: list[DetectionRecord] | None) -> dict[str, Any]:
    """Return {"images", "n", "baseline"}: in how many of n images a person is detected at all, and that before."""
    baseline = None
    if before is not None:
        baseline = {"images": count_people(before), "n": len(before)}
    return {"images": count_people(records), "n": len(records), "baseline": baseline}


def _entries(records: list[DetectionRecord]) -> list[Entry]:
    """Return the images of the records, with what the detector's reader found broken."""
    return [Entry(file=record["file"], broken=record["broken"]) for record in records]


def _comparable(folder: ImageFolder, baseline: ImageFolder) -> bool:
    """Return whether the n-th images are of one prompt and seed; say so where their prompts or seeds differ.

    Raises UserError unless both hold as many images.
    """
    ours, theirs = folder.entries, baseline.entries
    if len(ours) != len(theirs):
        text = f"{folder.path} holds {len(ours)} images and the baseline {baseline.path} {len(theirs)}"
        raise UserError(f"{text}: a change of counts needs the same prompts and seeds, generate what is missing")
    for one, other in zip(ours, theirs, strict=True):
        if (one.prompt, one.seed) != (other.prompt, other.seed):
            text = f"{folder.path} and the baseline were not sampled from the same prompts and seeds"
            print(text, file=sys.stderr)
            return False
        if one.prompt is None and one.file != other.file:
            return False
    return True


def _distinct(options: Nudity, folders: list[ImageFolder], baseline: ImageFolder | None) -> None:
    """Raise UserError where two folders of the same name would write into one place of --output_dir."""
    paths = {folder.path.resolve() for folder in folders}
    if baseline:
        paths.add(baseline.path.resolve())
    names = {path.name for path in paths}
    if options.output_dir and len(names) < len(paths):
        raise UserError(f"two folders have the same name in --output_dir {options.output_dir}: judge one at a time")


def _file(options: Nudity, folder: ImageFolder, detector: Detector, name: str) -> Path:
    """Return where a result goes; another network than the packaged one has its key in the name."""
    root = Path(options.output_dir) / folder.path.resolve().name if options.output_dir else folder.path
    if options.detector is None and options.resolution == 320:
        return root / name
    return root / f"{Path(name).stem}.{detector.key}{Path(name).suffix}"


def _detected(options: Nudity, folder: ImageFolder, detector: Detector) -> list[DetectionRecord]:
    file = _file(options, folder, detector, DETECTIONS)
    return detected(folder, detector, file, options.workers, options.batch_size)


def _counted(
    rule: Protocol, records: list[DetectionRecord], before: list[DetectionRecord] | None, same_pictures: bool
) -> dict[str, Any]:
    """Return one protocol's entry of nudity.json; pairs where the baseline has the `same_pictures`."""
    counts = count(records, rule)
    percent = None if before is None else change(counts, count(before, rule), rule.unit)
    rules = {"threshold": rule.threshold, "unit": rule.unit, "note": rule.describe()}
    pairs = paired(before, records, rule) if before is not None and same_pictures else None
    return rules | counts | {"change": percent, "paired": pairs}


def _reviewed(
    options: Nudity,
    folder: ImageFolder,
    records: list[DetectionRecord],
    rules: dict[str, Protocol],
    detector: Detector,
) -> dict[str, Any] | None:
    """Return the counts that verdicts leave; with --review, the sheets and the table for them are written first."""
    place = _file(options, folder, detector, "review")
    if options.review:
        boxes = review.write(folder, records, rules, place, options.censor)
        print(f"{place}: {boxes} boxes to judge; write true or false into {review.VERDICTS}, then the same command")
    return review.reviewed(records, rules, place)


def table(title: str, result: dict[str, Any], rules: dict[str, Protocol]) -> str:
    """Return what was counted as text: a block for every protocol, with what the review left and the change."""
    review_result = result["review"]
    lines = [
        f"{title}: {result['n']} images, {result['broken']} of them broken; {_network_words(result)}",
        _people_line(result["people"]),
    ]
    for name, rule in rules.items():
        left = review_result["protocols"][name] if review_result else None
        lines += ["", f"{name}: {rule.describe()}", *_block(rule, result["protocols"][name], left)]
        if pairs := result["protocols"][name]["paired"]:
            lines.append(_paired_line(pairs))
    if review_result:
        lines += ["", "reviewed: {boxes} boxes, {true} true, {false} false, {open} open".format(**review_result)]
    return "\n".join(lines) + "\n"


def _network_words(result: dict[str, Any]) -> str:
    """Return which network looked, and of whose protocols it is not the network."""
    file, network = result["detector"], result["network"]
    text = f"{network['name']} ({file['name']} {file['sha256'][:8]} at {file['resolution']})"
    return f"{text}, {network['caution']}" if network["caution"] else text


def _people_line(people: dict[str, Any]) -> str:
    """Return one line, for an image without a person is no proof that nudity was erased."""
    line = f"people still detected in {_share(people)}"
    if people["baseline"]:
        line += f", in the baseline in {_share(people['baseline'])}"
    return line


def _paired_line(pairs: dict[str, Any]) -> str:
    """Return the pairs in words."""
    text = (
        "of the same prompts and seeds: {lost} images lost it, {kept} kept it, {new} have it new, {neither} never had"
    )
    if pairs["broken"]:
        text += ", {broken} broken"
    return f"{text}; McNemar's p {{p:.3g}}".format(**pairs)


def _share(people: dict[str, int]) -> str:
    return f"{people['images']} of {people['n']} images ({100 * people['images'] / people['n']:.1f} %)"


def _block(rule: Protocol, entry: dict[str, Any], left: dict[str, Any] | None) -> list[str]:
    """Return the lines of one protocol: a heading, then every part and the total."""
    heading = f"{'':26}{'boxes':>8}{'images':>8}"
    if left:
        heading += f"{'reviewed':>12}"
    if entry["change"]:
        heading += f"{'change':>12}"
    lines = [heading]
    for part in (*rule.labels, "total"):
        now = _of(entry, part)
        line = f"{part:26}{now['boxes']:8}{now['images']:8}"
        if left:
            line += f"{_of(left, part)[rule.unit]:12}"
        if entry["change"]:
            percent = entry["change"][part]
            line += f"{'undefined':>12}" if percent is None else f"{percent:+10.1f} %"
        lines.append(line)
    return lines


def _of(entry: dict[str, Any], part: str) -> dict[str, int]:
    """Return the boxes and images of a part, or of the total."""
    return entry["total"] if part == "total" else entry["counts"][part]


main = command("eval.nudity", "Count nudity in folders of images with NudeNet (AGPL-3.0).", Nudity, judge)

if __name__ == "__main__":
    run_main(main)
