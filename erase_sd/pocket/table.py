"""The README's results table: the main job on concepts that no setting was tuned on, several seeds each.

    python -m erase_sd.pocket.table                # runs what is missing, then writes the table into the README
    python -m erase_sd.pocket.table --readme none  # the same without touching the README

Two jobs run at a time, one thread each; a killed table goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from erase_sd.options import knob, parse
from erase_sd.process import UserError, run_main
from erase_sd.runtime import around, replace_between, write_atomic

ROOT = Path(__file__).parents[2]
HELD_OUT = ("frog", "strawberry", "pencil style", "green background")


@dataclass(frozen=True, kw_only=True)
class Table:
    """What to measure and where to write it."""

    concepts: tuple[str, ...] = knob(HELD_OUT, "concepts, one row each")
    seeds: tuple[int, ...] = knob((0, 1, 2), "one run per concept and seed")
    eval_forget: int = knob(72, "pictures of the concept per run, before and after")
    eval_retain: int = knob(336, "pictures of everything else per run, before and after")
    output_dir: str = knob("runs/table", "where the runs go")
    processes: int = knob(2, "runs at a time, one thread each")
    readme: str | None = knob("README.md", "file whose table is replaced")


def main() -> int:
    """Run the jobs that are missing, print the table and write it where it belongs."""
    table = Table(**parse(sys.argv[1:], prog="pocket-table", description="Measure the results table.", t=Table)["t"])
    if table.readme:
        around(Path(table.readme), "table")  # refuses now what would be refused after an hour
    jobs = [(concept, seed) for seed in table.seeds for concept in table.concepts]
    with ThreadPoolExecutor(table.processes) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: run(table, *job), jobs), strict=True))
    text = markdown(table, runs)
    print(text)
    write_atomic(Path(table.output_dir) / "table.md", text)
    if table.readme:
        replace_between(Path(table.readme), "table", text)
    return 0


def run(table: Table, concept: str, seed: int) -> dict:
    """The record of one job, run as a user would run it; a complete one does nothing. Raises UserError if it fails."""
    folder = Path(table.output_dir) / f"{concept.replace(' ', '-')}-{seed}"
    command = [sys.executable, str(ROOT / "erase_sd" / "train.py"), "--model", "pocket", "--concept", concept]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    command += ["--eval_forget", str(table.eval_forget), "--eval_retain", str(table.eval_retain)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"the run {folder} failed with exit code {done.returncode}: see {log.name}")
    print(f"{concept}, seed {seed}: done", file=sys.stderr)
    return json.loads((folder / "run.json").read_text())


def markdown(table: Table, runs: dict[tuple[str, int], dict]) -> str:
    """One row per concept: rates in percent, mean over the seeds, 95 % interval over all their pictures."""
    lines = [
        "| concept | drawn when asked | nothing recognisable instead | retained objects | styles | backgrounds "
        "| spared on its prompts (worst kind) | entries re-initialised | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for concept in table.concepts:
        mine = [runs[concept, seed] for seed in table.seeds]
        scores = [record["scores"] for record in mine]
        n = sum(s["n"]["forget"] for s in scores), sum(s["n"]["retain"] for s in scores)
        retain = [_cell([s["retain"][kind] for s in scores], n[1]) for kind in ("object", "style", "background")]
        spared = min(scores[0]["spared"], key=lambda kind: mean(_change(s["spared"][kind]) for s in scores))
        cells = [
            concept,
            _cell([s["concept"] for s in scores], n[0]),
            f"{100 * mean(s['concept']['other_share'] for s in scores):.1f}",
            *retain,
            f"{spared} {_cell([s['spared'][spared] for s in scores], n[0])}",
            f"{mean(r['reinitialised'] for r in mine):,.0f}",
            f"{mean(r['seconds'] for r in mine) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    forget, retain = (len(table.seeds) * n for n in (table.eval_forget, table.eval_retain))
    lines.append(
        f"\nPercent, before → after [95 % interval of after]; seeds {_list(table.seeds)}; together {forget} pictures "
        f"of the concept and {retain} of everything else per row."
    )
    return "\n".join(lines) + "\n"


def _cell(rates: list[dict[str, float]], n: int) -> str:
    from erase_sd.pocket.score import wilson

    before, after = (mean(rate[when] for rate in rates) for when in ("before", "after"))
    low, high = wilson(after, n)
    return f"{100 * before:.1f} → {100 * after:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _change(rate: dict[str, float]) -> float:
    return rate["after"] - rate["before"]


def _list(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    run_main(main)
