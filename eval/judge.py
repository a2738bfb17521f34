"""From models to a table: `python -m eval.judge --protocol scissorhands-i2p --models base=MODEL ours=runs/nudity`.

A protocol says what is sampled, how, and what is counted: `eval.generate`, `eval.nudity` and `eval.quality` do it,
each into the folder of its model below --output_dir, and the table (judge.csv, judge.md) is made of that. The
same command goes on where it was stopped; `accelerate launch -m eval.judge ...` shares the sampling.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from erase_sd.common.cli import at_least, command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from eval.generate import Generation, generate, print_once
from eval.images.folder import ImageFolder, too_many_broken
from eval.nudity import Nudity, counted, rules_of
from eval.quality import Quality
from eval.quality import judge as measure


@dataclass(frozen=True, kw_only=True)
class JudgingProtocol:
    """What one published evaluation samples and counts."""

    note: str  # where it is from, and what is not the same as there
    prompts: str | None = None  # None: its authors' file, which --prompts has to name
    how: dict[str, Any] = field(default_factory=dict)  # options of eval.generate
    rules: tuple[str, ...] = ()  # protocols of eval.nudity
    quality: bool = False  # CLIP score and Fréchet distance to the first model


JUDGING = {
    "scissorhands-1k": JudgingProtocol(
        note="Scissorhands, Fig. 3 left: four prompts, 250 images each from one running generator, LMS",
        prompts="nudity",
        how={"images_per_prompt": 250, "scheduler": "lms", "running_generator": True},
        rules=("scissorhands",),
    ),
    "scissorhands-i2p": JudgingProtocol(
        note="Scissorhands, Fig. 3 right: all of I2P, LMS",
        prompts="i2p",
        how={"scheduler": "lms"},
        rules=("scissorhands",),
    ),
    "spm": JudgingProtocol(
        note="SPM: all of I2P with each row's own guidance and size; the model's own sampler",
        prompts="i2p",
        how={"per_row": True},
        rules=("spm",),
    ),
    "mace": JudgingProtocol(
        note="MACE: all of I2P; the model's own sampler",
        prompts="i2p",
        rules=("mace",),
    ),
    "uda-142": JudgingProtocol(
        note="UnlearnDiffAtk: its 142 rows of I2P, unattacked (--prompts FILE); the attack itself is eval.attack",
        rules=("unlearndiffatk",),
    ),
    "coco-10k": JudgingProtocol(
        note="captions of COCO (--prompts FILE), against the first model's images of the same captions",
        how={"rows": 10_000},
        quality=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Judging:
    """Which models, by which protocol."""

    protocol: Literal[*JUDGING] = knob(
        "scissorhands-i2p", ". ".join(f"{name}: {plan.note}" for name, plan in JUDGING.items())
    )
    models: tuple[str, ...] = knob(
        (), "NAME=WHAT, the original model first: a diffusers folder or Hub id, then runs, UNets or whole pipelines"
    )
    prompts: str | None = knob(
        None, "file of the protocol's prompts, instead of the Hub's copy or where there is none"
    )
    rows: int | None = knob(None, "only the first so many rows: a trial, which the table says")
    images_per_prompt: int | None = knob(None, "fewer images of a row than the protocol's: a trial as well")
    steps: int = knob(50, "denoising steps; with others than 50 it is a trial")
    detector: str | None = knob(None, "best.onnx of the protocol's authors, as in eval.nudity")
    features: str = knob(Quality.features, "what coco-10k measures with, as in eval.quality")
    dtype: Literal["float32", "float16", "bfloat16"] = knob("float32", "number format of the weights")
    batch_size: int = knob(8, "images sampled at a time")
    output_dir: str = knob("gen/judge", "folder of the table, with a folder of images for every model")

    def __post_init__(self) -> None:
        """Raise UserError for numbers too small and models that are none."""
        at_least(self, 1, "steps", "batch_size")
        for name in ("rows", "images_per_prompt"):
            if getattr(self, name) is not None:
                at_least(self, 1, name)
        seen = set()
        for text in self.models:
            name, sign, what = text.partition("=")
            if not (name and sign and what) or "/" in name or name.startswith("."):
                raise UserError(f"--models {text!r} is no NAME=WHAT: write base=MODEL ours=runs/nudity")
            if name in seen:
                raise UserError(f"--models names {name!r} twice: give every model a name of its own")
            seen.add(name)
        if not self.models:
            raise UserError(
                "--models is missing: write --models base=MODEL ours=runs/nudity, the original model first"
            )


def judge(options: Judging) -> int:
    """Sample, count and write the table; returns 1 where too many images are broken.

    Raises UserError for bad input before anything is sampled, and SystemExit when stopped: the same call goes on.
    """
    plan = JUDGING[options.protocol]
    jobs = sampling(options, plan)
    folders = [Path(job.output_dir) for job in jobs.values()]
    nudity = _nudity(options, plan, folders)
    state = PartialState()
    filled: list[ImageFolder] = []
    for name, job in jobs.items():
        print_once(state, f"{name}: {options.protocol}")
        filled.append(generate(job))
    if not state.is_main_process:
        return 0
    any_broken = any(too_many_broken(folder.entries) for folder in filled)
    counts: list[dict[str, Any]] = [{} for _ in filled]
    if nudity:
        counts, broken = counted(nudity)
        any_broken |= broken
    if plan.quality:
        any_broken |= bool(_measured(options, folders))
    rows = []
    for name, folder, count in zip(jobs, filled, counts, strict=True):
        rows.append(row_of(name, folder, count))
    text = page(options, plan, rows, counts)
    write_atomic(Path(options.output_dir, "judge.csv"), as_csv(rows))
    write_atomic(Path(options.output_dir, "judge.md"), text)
    print(text)
    return int(any_broken)


def sampling(options: Judging, plan: JudgingProtocol) -> dict[str, Generation]:
    """Return what to sample for every model, by its name. Raises UserError where the prompts are missing."""
    prompts = options.prompts or plan.prompts
    if prompts is None:
        raise UserError(f"--protocol {options.protocol} needs its authors' prompts: give the file, --prompts FILE")
    how = {"prompts": prompts, "steps": options.steps, "dtype": options.dtype, "batch_size": options.batch_size}
    how |= plan.how
    for name in ("rows", "images_per_prompt"):
        if getattr(options, name) is not None:
            how[name] = getattr(options, name)
    _, _, base = options.models[0].partition("=")
    jobs = {}
    for text in options.models:
        name, _, what = text.partition("=")
        jobs[name] = Generation(output_dir=str(Path(options.output_dir, name)), **how, **parts(what, base))
    return jobs


def parts(what: str, base: str) -> dict[str, str]:
    """Return the options of eval.generate that load a model: whole, or the network of a run in the `base` model."""
    if what == base or (Path(what) / "model_index.json").is_file():
        return {"model": what}
    part = "transformer" if (Path(what) / "transformer").is_dir() else "unet"
    return {"model": base, part: what}


def _nudity(options: Judging, plan: JudgingProtocol, folders: list[Path]) -> Nudity | None:
    """Return what to count, the first model being the baseline. Raises UserError where that cannot be done."""
    if not plan.rules:
        return None
    paths = [str(folder) for folder in folders]
    baseline = paths[0] if len(paths) > 1 else None
    nudity = Nudity(folder=tuple(paths), baseline=baseline, protocol=plan.rules, detector=options.detector)
    rules_of(nudity)
    if find_spec("nudenet") is None:
        raise UserError(f"--protocol {options.protocol} counts by NudeNet: pip install 'erase-sd[eval]'")
    return nudity


def _measured(options: Judging, folders: list[Path]) -> int:
    """Measure CLIP score and distance to the first model; returns 1 where too many images are broken."""
    asked = Quality(folder=(str(folders[0]),), features=options.features)
    code = 0
    if options.features.startswith("clip:"):
        code = measure(replace(asked, metrics=("clip",)))
    if len(folders) == 1:
        return code
    others = tuple(map(str, folders[1:]))
    metrics = ("fid", "clip") if options.features.startswith("clip:") else ("fid",)
    return code | measure(replace(asked, folder=others, baseline=str(folders[0]), metrics=metrics))


def row_of(name: str, folder: ImageFolder, count: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a model by their columns: images, what was counted, what was measured."""
    row = {"model": name, "images": str(len(folder.entries))}
    row["broken"] = str(count["broken"] if count else sum(bool(entry.broken) for entry in folder.entries))
    if count:
        row["people"] = str(count["people"]["images"])
        for rule, entry in count["protocols"].items():
            row[f"{rule}, {entry['unit']}"] = str(entry["total"][entry["unit"]])
            change = entry["change"]["total"] if entry["change"] else None
            row[f"{rule}, change in %"] = "" if change is None else f"{change:.1f}"
    file = folder.path / "quality.json"
    if file.is_file():
        for metric in json.loads(file.read_text(encoding="utf-8"))["metrics"]:
            row[metric["title"]] = f"{metric['value']:.4f}"
    return row


def _columns(rows: list[dict[str, str]]) -> list[str]:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    return list(columns)


def as_csv(rows: list[dict[str, str]]) -> str:
    """Return the table with a header; a cell that a model has not is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def page(options: Judging, plan: JudgingProtocol, rows: list[dict[str, str]], counts: list[dict[str, Any]]) -> str:
    """Return the table in Markdown, under what it is of and what is not as published."""
    lines = [f"# {options.protocol}", "", f"{plan.note}."]
    trial = [
        f"--{name} {getattr(options, name)}"
        for name in ("rows", "images_per_prompt", "steps")
        if getattr(options, name) not in (None, Judging.steps)
    ]
    if trial:
        lines += ["", f"A trial, not the protocol: {', '.join(trial)}."]
    if counts[0] and counts[0]["network"]["caution"]:
        lines += ["", f"Counted on {counts[0]['network']['name']}, {counts[0]['network']['caution']}."]
    columns = _columns(rows)
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(row.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


main = command("eval.judge", "Judge models by a published protocol: sample, count, one table.", Judging, judge)

if __name__ == "__main__":
    run_main(main)
