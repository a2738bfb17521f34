"""Sections about a run: its scores, its curves, its record."""

from __future__ import annotations

import shlex
from typing import Any

from eval.judges.protocols import caution, network_of
from eval.reporting.blocks import Block, Gallery, Note, Table, stored
from eval.reporting.inputs import ErasureRun, ImageSet

RATES = {  # of scores.json: how a rate is called, and which way is the better one
    "concept": ("prompts with the concept: it is seen", "lower"),
    "concepts": ("prompts with {}: it is seen", "lower"),
    "retain": ("other prompts: the right {} is seen", "higher"),
    "spared": ("prompts with the concept: the right {} is seen", "higher"),
}


def scores(runs: list[ErasureRun]) -> list[Block]:
    """Return what the runs themselves measured, before and after."""
    rows, captions, notes = [], [], []
    for run in runs:
        if run.scores:
            for row in _rates(run.scores):
                rows.append([run.name, *row])
            captions.append(_counts(run))
        else:
            notes.append(Note(f"{run.name} was not judged: draw its images, then judge them.", grid_command(run)))
    if not rows:
        return notes
    head = ["run", "share of images", "better", "before, %", "after, %", "after, 95 % interval"]
    words = 3
    if len(runs) == 1:  # whose name is in the title
        head = head[1:]
        rows = [row[1:] for row in rows]
        words -= 1
    return [Table(head, rows, words, "; ".join(dict.fromkeys(captions))), *notes]


def _rates(found: dict[str, Any]) -> list[list[str]]:
    """Return [rate, better, before, after, interval] of everything in scores.json that has a before and an after."""
    rows = []
    for group, (words, better) in RATES.items():
        rates, intervals = found.get(group, {}), found.get("ci95", {}).get(group, {})
        if group == "concept":  # one rate; the other groups have one for every kind
            rates, intervals = {"": rates}, {"": intervals}
        for kind, rate in rates.items():
            low, high = intervals.get(kind, {}).get("after", (None, None))
            interval = "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}"
            if "before" in rate and "after" in rate:
                rows.append([words.format(kind), better, _share(rate["before"]), _share(rate["after"]), interval])
    return rows


def _share(rate: float | None) -> str:
    return "not measured" if rate is None else f"{100 * rate:.1f}"


def _counts(run: ErasureRun) -> str:
    """Return how many images a run's scores are of."""
    n, other = run.scores.get("n", {}), run.scores.get("concept", {}).get("other_share")
    text = f"{n.get('forget', '?')} images of the concept, {n.get('retain', '?')} of other prompts"
    if other is not None:
        text += f"; {100 * other:.1f} % of the former show nothing that the judge knows"
    return text


def grid_command(run: ErasureRun) -> str:
    """Return the command that samples a run's images beside the original model's."""
    model = str(run.record["config"].get("model"))
    source = "pocket" if model == "pocket" else "i2p"
    return shlex.join(["python", "-m", "eval.grid", "--prompts", source, "--model", model, "--unet", str(run.path)])


def plots(runs: list[ErasureRun], name: str, words: str) -> list[Block]:
    """Return a picture that every run writes, in its own file."""
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        file = run.path / f"{name}.png"
        if file.is_file():
            alt = f"{run.name}: {name.replace('_', ' ')}, {words}"
            blocks.append(Gallery([stored(file, f"{name}-{number}", alt, f"{run.name}: {words}")]))
        else:
            config = run.record["config"]
            command = ["erase-sd", "--model", str(config.get("model")), "--concept", run.concept]
            command += ["--method", str(config.get("method")), "--output_dir", str(run.path)]
            text = f"{run.name} has no {file.name}: a run with steps and a trim writes it when it finishes."
            blocks.append(Note(text, shlex.join(command)))
    return blocks


SHOWN = ("config", "base", "seconds", "peak_memory_mib", "reinitialised", "environment")  # the rest has its section
LONGEST = 8  # entries of a list that is written out


def record(runs: list[ErasureRun]) -> list[Block]:
    """Return settings and surroundings, a column for every run, so that differences stand side by side."""
    columns = []
    keys: dict[str, None] = {}  # in the order of the records
    for run in runs:
        column = _flat({key: run.record[key] for key in SHOWN if key in run.record})
        keys |= dict.fromkeys(column)
        columns.append(column)
    rows = []
    for key in keys:
        rows.append([key, *(column.get(key, "not recorded") for column in columns)])
    return [Table(["", *(run.name for run in runs)], rows, 1 + len(runs))]


def _flat(values: dict[str, Any], name: str = "") -> dict[str, str]:
    """Return nested values under names such as "environment: torch"; the options of the config keep their own."""
    found: dict[str, str] = {}
    for key, value in values.items():
        whole = f"{name}: {key}" if name and name != "config" else key
        if isinstance(value, dict):
            found |= _flat(value, whole)
        else:
            found[whole] = readable(value)
    return found


def readable(value: Any) -> str:
    """Return a value as it is read, not as JSON writes it."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {readable(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(readable(item) for item in value) if len(value) <= LONGEST else f"{len(value)} entries"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def protocols(runs: list[ErasureRun], images: list[ImageSet]) -> list[Block]:
    """Return under which rules every number of the page was measured."""
    rows = []
    for run in runs:
        if run.scores and run.scores.get("protocol"):
            rows.append([f"{run.name}: scores", readable(run.scores["protocol"])])
    for judged in images:
        rows.append([f"{judged.name}: images", readable(judged.folder.generation)])
        if judged.nudity:
            network = judged.nudity["detector"]
            for name, rule in judged.nudity["protocols"].items():
                warning = caution([name], network_of(network["sha256"]))
                words = f"{readable(network)}, {warning}" if warning else readable(network)
                rows.append([f"{judged.name}: nudity, {name}", f"{rule['note']}; {words}"])
        if judged.quality:
            for metric in judged.quality["metrics"]:
                title = f"{judged.name}: {metric['name']}, {metric['features']}"
                rows.append([title, readable(metric["protocol"])])
        if judged.concepts:
            rows.append([f"{judged.name}: concepts", readable(judged.concepts.get("protocol"))])
    if rows:
        return [Table(["numbers", "rules"], rows, 2)]
    return [Note("Nothing was judged: a judge writes its rules beside its numbers.", "python -m eval.nudity FOLDER")]
