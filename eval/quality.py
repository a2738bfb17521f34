"""What an erased model kept: `python -m eval.quality gen/erased --baseline gen/sd --features clip:ID_OR_FOLDER`.

CLIP score, FID, KID, CMMD and same-seed drift of folders of images, against another folder or stored statistics, into
quality.json of each folder. Features and statistics are cached there; metrics of other features stay in quality.json
as long as the images are the same. Broken images have no features: they are counted, and left out of every metric.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from erase_sd.common.cli import argument, at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic

if TYPE_CHECKING:
    from eval.features.cache import Features
    from eval.features.metrics import Metric, Setting
    from eval.images.folder import ImageFolder

NAMES = ("fid", "kid", "cmmd", "clip", "drift")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What to look at, with which eyes, and what to compare it with."""

    folder: tuple[str, ...] = argument("folders of images, of eval.generate or any others")
    baseline: str | None = knob(None, "folder to compare with: the original model's images, or real ones")
    statistics: str | None = knob(None, "file of --save_statistics to compare with, which FID alone can")
    save_statistics: str | None = knob(None, "write mean and covariance of the one folder's features to this file")
    metrics: tuple[Literal[*NAMES], ...] = knob((), "what to compute (default: all that can be, naming the others)")
    features: str = knob(
        "clip:openai/clip-vit-base-patch32",
        "clip:ID_OR_FOLDER, dinov2:ID_OR_FOLDER, torchscript:FILE (InceptionV3 for FID and KID as published, such as "
        "StyleGAN's inception-2015-12-05.pt) or pocket",
    )
    batch_size: int = knob(32, "images in a batch")
    seed: int = knob(0, "seed of KID's subsets")

    def __post_init__(self) -> None:
        """Raise UserError for numbers out of range, and for two things to compare with."""
        at_least(self, 1, "batch_size")
        at_least(self, 0, "seed")
        if self.baseline and self.statistics:
            raise UserError("--baseline and --statistics are both something to compare with: give one of them")
        if self.save_statistics and len(self.folder) != 1:
            raise UserError(f"--save_statistics is for one folder, not {len(self.folder)}: run it for each")


def judge(options: Quality) -> int:
    """Write quality.json of every folder; returns 1 where too many images are broken, the baseline's included.

    Raises UserError for bad input, and for a metric that was asked for and cannot be computed.
    """
    from eval.features import cache as features
    from eval.features.extractors import load
    from eval.features.metrics import METRICS
    from eval.images.folder import read

    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    chosen = [_chosen(options, folder, baseline) for folder in folders]
    setting = _setting(options, load(options.features), baseline)
    ruined = _ruined(setting.theirs) if setting.theirs else False
    for folder, names in zip(folders, chosen, strict=True):
        ours = features.of_folder(folder, setting.extractor, options.batch_size)
        ruined |= _ruined(ours)
        if options.save_statistics:
            features.statistics_of(ours, setting.extractor, Path(options.save_statistics))
        fresh = [entry for name in names for entry in METRICS[name](ours, setting)]
        result = {
            "metrics": [*_kept(folder.path / "quality.json", fresh, ours, setting), *fresh],
            "n": len(ours.entries),
            "broken": len(ours.entries) - len(ours.sound),
        }
        write_atomic(folder.path / "quality.json", json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result))
    return int(ruined)


def _setting(options: Quality, extractor: Any, baseline: ImageFolder | None) -> Setting:
    """What to compare with, computed or read."""
    from eval.features.cache import of_folder, read_statistics, statistics_of
    from eval.features.metrics import Setting

    setting = Setting(extractor=extractor, seed=options.seed, batch_size=options.batch_size)
    if options.statistics:
        statistics, images = read_statistics(Path(options.statistics), extractor)
        return replace(setting, against=options.statistics, statistics=statistics, images=images)
    if baseline is None:
        return setting
    theirs = of_folder(baseline, extractor, options.batch_size)
    statistics = statistics_of(theirs, extractor)
    return replace(setting, against=options.baseline, theirs=theirs, statistics=statistics, images=theirs.images)


def _chosen(options: Quality, folder: ImageFolder, baseline: ImageFolder | None) -> list[str]:
    """The metrics to compute. Raises UserError where one that was asked for lacks something, or none is left."""
    lacks = {name: _lack(name, options, folder, baseline) for name in options.metrics or NAMES}
    possible = [name for name, lack in lacks.items() if not lack]
    for lack in dict.fromkeys(filter(None, lacks.values())):
        names = ", ".join(name for name in lacks if lacks[name] == lack)
        if options.metrics:
            raise UserError(f"{names} of {folder.path} cannot be computed: {lack}")
        if possible:
            print(f"{folder.path}: without {names}: {lack}", file=sys.stderr)
    if not possible and not options.save_statistics:
        raise UserError(f"no metric of {folder.path} can be computed: give --baseline, --statistics or CLIP features")
    return possible


def _lack(name: str, options: Quality, folder: ImageFolder, baseline: ImageFolder | None) -> str | None:
    """What is missing to compute a metric, as the next step to take."""
    if name != "clip" and baseline is None and not (name == "fid" and options.statistics):
        return "give --baseline FOLDER (--statistics FILE is enough for FID)"
    if name in ("cmmd", "clip") and not options.features.startswith("clip:"):
        return f"defined on CLIP, not on --features {options.features}: give clip:ID_OR_FOLDER"
    if name == "clip" and any(entry.prompt is None for entry in folder.entries):
        return "its images have no prompts: give a folder with the manifest.jsonl of eval.generate"
    if name == "drift" and any(e.row is None or e.seed is None for f in (folder, baseline) for e in f.entries):
        return "rows and seeds are unknown: give two folders with the manifest.jsonl of eval.generate"
    return None


def _kept(file: Path, fresh: list[Metric], ours: Features, setting: Setting) -> list[Metric]:
    """Earlier metrics that are still true: of the same images, against the same, and not measured again."""
    if not file.is_file():
        return []
    try:
        old = json.loads(file.read_text(encoding="utf-8"))["metrics"]
        measured = {(e["name"], e["features"], e["against"]) for e in fresh}
        return [
            e
            for e in old
            if (e["name"], e["features"], e["against"]) not in measured
            and e["protocol"]["images"] == ours.images
            and (e["against"] != setting.against or e["protocol"]["against_images"] == setting.images)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): remove it and run the same command again") from error


def _ruined(ours: Features) -> bool:
    """Whether so many images are broken that the numbers must not look like a success; then it is said."""
    from eval.images.folder import too_many_broken

    if ruined := too_many_broken(ours.entries):
        broken = [entry.file for entry in ours.entries if entry.broken]
        text = f"{len(broken)} of {len(ours.entries)} images of {ours.path} are broken ({broken[0]} ...)"
        print(f"{text}: no metric sees them, do not trust these numbers", file=sys.stderr)
    return ruined


def table(title: str, result: dict[str, Any]) -> str:
    """What was measured, as text."""
    lines = [f"{title}: {result['n']} images, {result['broken']} of them broken and left out"]
    for entry in result["metrics"]:
        n = " and ".join(map(str, entry["n"])) if isinstance(entry["n"], list) else entry["n"]
        against = f" against {entry['against']}" if entry["against"] else ""
        lines.append(f"{entry['name']:12}{entry['value']:12.4f} {entry['unit']}, {entry['features']}, n {n}{against}")
    return "\n".join(lines) + "\n"


main = command(
    "eval.quality", "Measure what folders of images kept of another folder and of their prompts.", Quality, judge
)

if __name__ == "__main__":
    run_main(main)
