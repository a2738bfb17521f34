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
from typing import Any, Literal

from erase_sd.common.cli import argument, at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from eval.features.cache import Features, of_folder, read_statistics, statistics_of
from eval.features.extractors import Extractor, load
from eval.features.metrics import METRICS, Metric, Setting
from eval.images.folder import ImageFolder, read, warn_if_broken

NAMES = tuple(METRICS)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What to look at, by which features, and what to compare it with."""

    folder: tuple[str, ...] = argument("folders of images, of eval.generate or any others")
    baseline: str | None = knob(None, "folder to compare with: the original model's images, or real ones")
    statistics: str | None = knob(
        None, "file of --save_statistics, or a published .npz, to compare with, which FID alone can"
    )
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
    folders = [read(path) for path in options.folder]
    baseline = read(options.baseline) if options.baseline else None
    chosen = [_chosen(options, folder, baseline) for folder in folders]
    setting = _setting(options, load(options.features), baseline)
    any_broken = False
    if setting.theirs:
        any_broken = warn_if_broken(setting.theirs.entries, setting.theirs.path)
    for folder, names in zip(folders, chosen, strict=True):
        ours = of_folder(folder, setting.extractor, options.batch_size)
        any_broken |= warn_if_broken(ours.entries, ours.path)
        if options.save_statistics:
            statistics_of(ours, setting.extractor, Path(options.save_statistics))
        measured: list[Metric] = []
        for name in names:
            measured += METRICS[name](ours, setting)
        result = {
            "metrics": [*_kept(folder.path / "quality.json", measured, ours, setting), *measured],
            "n": len(ours.entries),
            "broken": len(ours.entries) - len(ours.sound),
        }
        write_atomic(folder.path / "quality.json", json.dumps(result, indent=2) + "\n")
        print(table(str(folder.path), result))
    return int(any_broken)


def _setting(options: Quality, extractor: Extractor, baseline: ImageFolder | None) -> Setting:
    """Return what to compare with, computed or read."""
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
    """Return the metrics to compute, and say which others cannot be.

    Raises UserError where one that was asked for lacks something, or none is left.
    """
    possible: list[str] = []
    impossible: dict[str, list[str]] = {}  # what is missing -> the metrics that need it
    for name in dict.fromkeys(options.metrics or NAMES):
        lack = _lack(name, options, folder, baseline)
        if lack is None:
            possible.append(name)
        else:
            impossible.setdefault(lack, []).append(name)
    for lack, names in impossible.items():
        if options.metrics:
            raise UserError(f"{', '.join(names)} of {folder.path} cannot be computed: {lack}")
        if possible:
            print(f"{folder.path}: without {', '.join(names)}: {lack}", file=sys.stderr)
    if not possible and not options.save_statistics:
        raise UserError(f"no metric of {folder.path} can be computed: give --baseline, --statistics or CLIP features")
    return possible


def _lack(name: str, options: Quality, folder: ImageFolder, baseline: ImageFolder | None) -> str | None:
    """Return what is missing to compute a metric, as the next step to take; None where nothing is."""
    if name != "clip" and baseline is None and not (name == "fid" and options.statistics):
        return "give --baseline FOLDER (--statistics FILE is enough for FID)"
    if name in ("cmmd", "clip") and not options.features.startswith("clip:"):
        return f"defined on CLIP, not on --features {options.features}: give clip:ID_OR_FOLDER"
    if name == "clip" and not _has_prompts(folder):
        return "its images have no prompts: give a folder with the manifest.jsonl of eval.generate"
    if name == "drift" and not (_has_seeds(folder) and _has_seeds(baseline)):
        return "rows and seeds are unknown: give two folders with the manifest.jsonl of eval.generate"
    return None


def _has_prompts(folder: ImageFolder) -> bool:
    return all(entry.prompt is not None for entry in folder.entries)


def _has_seeds(folder: ImageFolder) -> bool:
    return not any(entry.row is None or entry.seed is None for entry in folder.entries)


def _kept(file: Path, measured: list[Metric], ours: Features, setting: Setting) -> list[Metric]:
    """Return the earlier metrics that are still true: of the same images, against the same, not measured again."""
    if not file.is_file():
        return []
    kept = []
    try:
        replaced = {_identity(metric) for metric in measured}
        for metric in json.loads(file.read_text(encoding="utf-8"))["metrics"]:
            if _identity(metric) in replaced:
                continue
            protocol = metric["protocol"]
            if protocol["images"] != ours.images:
                continue
            if metric["against"] == setting.against and protocol["against_images"] != setting.images:
                continue
            kept.append(metric)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): remove it and run the same command again") from error
    return kept


def _identity(metric: Metric) -> tuple[str, str, str | None]:
    """Return what a later measurement of the same replaces."""
    return metric["name"], metric["features"], metric["against"]


def table(title: str, result: dict[str, Any]) -> str:
    """Return what was measured as text."""
    lines = [f"{title}: {result['n']} images, {result['broken']} of them broken and left out"]
    for entry in result["metrics"]:
        counts = entry["n"] if isinstance(entry["n"], list) else [entry["n"]]
        n = " and ".join("unknown" if count is None else str(count) for count in counts)
        against = f" against {entry['against']}" if entry["against"] else ""
        title = entry.get("title", entry["name"])  # written by earlier versions: without a title
        value = f"{title:12}{entry['value']:12.4f} {entry['unit']}"
        lines.append(f"{value}, {entry['features']}, n {n}{against}")
        for caution in ("warning", "statistics"):
            if caution in entry["protocol"]:
                lines.append(f"{'':12}caution: {entry['protocol'][caution]}")
    return "\n".join(lines) + "\n"


main = command(
    "eval.quality", "Measure what folders of images kept of another folder and of their prompts.", Quality, judge
)

if __name__ == "__main__":
    run_main(main)
