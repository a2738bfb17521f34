"""The sections of a report that say how it came about: the record of every run, and the rules of every judge."""

from __future__ import annotations

from typing import Any

from eval.evidence import Images, Run
from eval.sections import Block, Note, Table

SHOWN = (
    "config",
    "base",
    "seconds",
    "peak_memory_mib",
    "reinitialised",
    "environment",
)  # the rest has its own section
LONGEST = 8  # entries of a list that is written out


def record(runs: list[Run]) -> list[Block]:
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


def protocols(runs: list[Run], images: list[Images]) -> list[Block]:
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
