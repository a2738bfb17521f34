"""Sections about a run: its scores, its curves, its record."""

from __future__ import annotations

import shlex
from typing import Any

from eval.reporting.blocks import Block, Gallery, Note, Table, stored
from eval.reporting.inputs import ErasureRun, ImageSet

RATES = {  # of scores.json: how a rate is called, and which way is the better one
    "concept": ("prompts with the concept: it is seen", "lower"),
    "retain": ("other prompts: the right {} is seen", "higher"),
    "spared": ("prompts with the concept: the right {} is seen", "higher"),
}


def scores(runs: list[ErasureRun]) -> list[Block]:
    """What the run itself measured, before and after."""
    rows = [[run.name, *row] for run in runs if run.scores for row in _rates(run.scores)]
    blocks: list[Block] = []
    if rows:
        alone = len(runs) == 1
        head = ["run", "share of images", "better", "before, %", "after, %", "after, 95 % interval"]
        caption = "; ".join(dict.fromkeys(_counts(run) for run in runs if run.scores))
        blocks.append(Table(head[alone:], [row[alone:] for row in rows], 3 - alone, caption))
    missing = [run for run in runs if not run.scores]
    return blocks + [
        Note(f"{run.name} was not judged: draw its images, then judge them.", draw(run)) for run in missing
    ]


def _rates(found: dict[str, Any]) -> list[list[str]]:
    """[rate, better, before, after, interval] of everything in scores.json that has a before and an after."""
    rows = []
    for group, (words, better) in RATES.items():
        rates, intervals = found.get(group, {}), found.get("ci95", {}).get(group, {})
        kinds = {"": rates} if group == "concept" else rates
        for kind, rate in kinds.items():
            low, high = (intervals if group == "concept" else intervals.get(kind, {})).get("after", (None, None))
            interval = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
            if {"before", "after"} <= rate.keys():
                shares = [_share(rate["before"]), _share(rate["after"])]
                rows.append([words.format(kind), better, *shares, interval])
    return rows


def _share(rate: float | None) -> str:
    return "not measured" if rate is None else f"{100 * rate:.1f}"


def _counts(run: ErasureRun) -> str:
    n, other = run.scores.get("n", {}), run.scores.get("concept", {}).get("other_share")
    text = f"{n.get('forget', '?')} images of the concept, {n.get('retain', '?')} of other prompts"
    return text if other is None else f"{text}; {100 * other:.1f} % of the former show nothing that the judge knows"


def draw(run: ErasureRun) -> str:
    """The command that draws a run's images beside the original model's."""
    model = str(run.record["config"].get("model"))
    source = "pocket" if model == "pocket" else "i2p"
    return shlex.join(["python", "-m", "eval.grid", "--prompts", source, "--model", model, "--unet", str(run.path)])


def plots(runs: list[ErasureRun], name: str, words: str) -> list[Block]:
    """A picture that every run writes, in its own file."""
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        file = run.path / f"{name}.png"
        if file.is_file():
            alt = f"{run.name}: {name.replace('_', ' ')}, {words}"
            blocks.append(Gallery([stored(file, f"{name}-{number}", alt, f"{run.name}: {words}")]))
            continue
        config = run.record["config"]
        command = ["erase-sd", "--model", str(config.get("model")), "--concept", run.concept]
        command += ["--method", str(config.get("method")), "--output_dir", str(run.path)]
        text = f"{run.name} has no {file.name}: a run with steps and a trim writes it when it finishes."
        blocks.append(Note(text, shlex.join(command)))
    return blocks


SHOWN = (
    "config",
    "base",
    "seconds",
    "peak_memory_mib",
    "reinitialised",
    "environment",
)  # the rest has its own section
LONGEST = 8  # entries of a list that is written out


def record_section(runs: list[ErasureRun]) -> list[Block]:
    """Settings and surroundings, a column for every run, so that differences stand side by side."""
    flat = [_flat({key: run.record[key] for key in SHOWN if key in run.record}) for run in runs]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    rows = [[key, *(row.get(key, "not recorded") for row in flat)] for key in keys]
    return [Table(["", *(run.name for run in runs)], rows, 1 + len(runs))]


def _flat(values: dict[str, Any], name: str = "") -> dict[str, str]:
    """Nested values under names such as "environment: torch"; the knobs of the config keep their own."""
    found: dict[str, str] = {}
    for key, value in values.items():
        whole = f"{name}: {key}" if name and name != "config" else key
        found |= _flat(value, whole) if isinstance(value, dict) else {whole: text(value)}
    return found


def text(value: Any) -> str:
    """A value as it is read, not as JSON writes it."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(text, value)) if len(value) <= LONGEST else f"{len(value)} entries"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def protocols(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """Under which rules every number of the page was taken."""
    rows = [
        [f"{run.name}: scores", text(run.scores["protocol"])] for run in runs if (run.scores or {}).get("protocol")
    ]
    for judged in images:
        rows.append([f"{judged.name}: images", text(judged.folder.generation)])
        if judged.nudity:
            network = text(judged.nudity["detector"])
            rules = judged.nudity["protocols"].items()
            rows += [[f"{judged.name}: nudity, {name}", f"{rule['note']}; {network}"] for name, rule in rules]
        for entry in judged.quality["metrics"] if judged.quality else []:
            rows.append([f"{judged.name}: {entry['name']}, {entry['features']}", text(entry["protocol"])])
        if judged.concepts:
            rows.append([f"{judged.name}: concepts", text(judged.concepts.get("protocol"))])
    if rows:
        return [Table(["numbers", "rules"], rows, 2)]
    return [Note("Nothing was judged: a judge writes its rules beside its numbers.", "python -m eval.nudity FOLDER")]
