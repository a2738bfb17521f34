"""Every method against Retrain, in one table like the paper's Table 1: `python -m classification.benchmark`.

Run s of a method forgets the forget set of seed s from the network of seed s. Its Retrain starts from other weights
than that network did, and a second Retrain from others again: their distance is the noise floor of all gaps.
Runs that exist cost nothing, killed ones go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from classification.methods import METHODS
from classification.metrics.lira import attack
from classification.reporting import figures
from classification.reporting.tables import ScoreRecord, TableRow, as_csv, as_markdown, of_paper, row, verdict
from classification.run.jobs import run_all
from classification.run.measure import RELEARN, measured
from erase_sd.common.cli import command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic

AGAIN = "retrain again"
OWN_INIT = {"retrain": 100, AGAIN: 200}  # added to the seed, so that no Retrain starts where the raw network did
LEGEND = """Percent, mean ± sample standard deviation over {seeds} seeds. Avg. Gap: mean absolute difference of the
means to Retrain's over the four columns before it; paired gap: the same of each seed to its own Retrain. RTE: wall
time as a share of Retrain's. Relearn: median epochs of SGD (lr {lr:g}, batches of {batch_size}) on the forget set
until the raw network's accuracy on it is back.
"""
SHADOWS = """LiRA: likelihood-ratio attack with {shadows} shadow models of each kind on one forget set; the AUC of
exact unlearning is 0.5, its true positives are as rare as its false ones.
"""


@dataclass(frozen=True, kw_only=True)
class ClassifierBenchmark:
    """What to compare, on what, and where the table goes."""

    dataset: str = knob("digits", "digits, cifar10, cifar100, svhn, celeba, fashion-mnist, mnist or kmnist")
    data_dir: str | None = knob(None, "folder with the data in their original format (default: the Hub)")
    forget: tuple[str, ...] = knob(("random:0.1", "class:3"), "forget sets, one table each")
    methods: tuple[str, ...] = knob(tuple(METHODS), "methods; Retrain is always among them")
    seeds: int = knob(5, "runs of each, with seeds from 0 on")
    relearn: bool = knob(True, "measure how many epochs bring the forget set back")
    lira: int | None = knob(None, "shadow models of LiRA, 3 or more, 0 for none (default: 4 for digits, else 0)")
    output_dir: str = knob("runs/benchmark", "folder of the runs")
    report: str | None = knob(None, "folder of the tables and the plot (default: that of the runs)")
    processes: int = knob(2, "runs at a time, one thread each")

    def __post_init__(self) -> None:
        """Raise UserError for what cannot be compared."""
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
        for name in ("seeds", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is too few: give 1 or more")
        if self.lira is not None and self.lira != 0 and self.lira < 3:
            raise UserError(f"--lira {self.lira} is too few: give 3 or more")

    @property
    def shadows(self) -> int:
        """Return the number of shadow models of each kind."""
        if self.lira is not None:
            return self.lira
        return 4 if self.dataset == "digits" else 0


def compare(options: ClassifierBenchmark) -> None:
    """Run what is missing, then write and print the tables."""
    rows = results(options)
    place = Path(options.report or options.output_dir) / f"benchmark_{options.dataset}"
    page = markdown(options, rows)
    write_atomic(place.with_suffix(".csv"), as_csv(rows))
    write_atomic(place.with_suffix(".md"), page)
    figures.gaps(rows, AGAIN, place.with_suffix(".png"))
    print(f"{page}\n{place}.csv, .md, .png")


def jobs(
    options: ClassifierBenchmark, runs: int, forget_seed: int | None = None
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the values of every run by forget set, name in the table and seed.

    All runs are of one forget set if its seed is given.
    """
    names = ["retrain", AGAIN]
    for name in options.methods:
        if name != "retrain":
            names.append(name)
    wanted = {}
    for forget in options.forget:
        for name in names:
            for s in range(runs):
                wanted[forget, name, s] = job(options, forget, name, s)
                if forget_seed is not None:
                    wanted[forget, name, s]["forget_seed"] = forget_seed
    return wanted


def job(options: Any, forget: str, name: str, s: int) -> dict[str, Any]:
    """Return the values of run s of a method, or of the second Retrain; data and folders are those of the options."""
    return {
        "dataset": options.dataset,
        "data_dir": options.data_dir,
        "output_dir": options.output_dir,
        "method": "retrain" if name == AGAIN else name,
        "forget": forget,
        "forget_seed": s,
        "train_seed": s,
        "seed": s + OWN_INIT.get(name, 0),
    }


def results(options: ClassifierBenchmark) -> list[TableRow]:
    """Return the rows, one per forget set and method; what is missing is run."""
    runs_of = _records(options, jobs(options, options.seeds), options.relearn, "benchmark")
    shadows: dict[tuple[str, str], list[ScoreRecord]] = {}
    if options.shadows:
        shadows = _records(options, jobs(options, options.shadows, forget_seed=0), False, "shadow models")
    rows = []
    for (forget, name), runs in runs_of.items():
        rates = {}
        if shadows and name != "retrain":
            rates = attacked(shadows[forget, name], shadows[forget, "retrain"])
        theirs = of_paper(options.dataset, forget).get(name)
        rows.append(row(name, forget, runs, runs_of[forget, "retrain"], attack=rates, paper=theirs))
    return rows


def _records(
    options: ClassifierBenchmark, wanted: dict[tuple[str, str, int], dict[str, Any]], relearning: bool, text: str
) -> dict[tuple[str, str], list[ScoreRecord]]:
    """Return the records of these runs by forget set and name, in the order of the seeds."""
    found = run_all(wanted.values(), options.processes, text, partial(measured, relearning=relearning))
    grouped: dict[tuple[str, str], list[ScoreRecord]] = {}
    for (forget, name, _), record in zip(wanted, found, strict=True):
        grouped.setdefault((forget, name), []).append(record)
    return grouped


def attacked(unlearned: list[ScoreRecord], never: list[ScoreRecord]) -> dict[str, float]:
    """Return how well LiRA tells these shadow models' forget sets from those that Retrain never saw."""
    found = attack(_confidences(unlearned), _confidences(never), pooled=True)  # few shadow models: one variance
    return found._asdict()


def _confidences(runs: Iterable[ScoreRecord]) -> torch.Tensor:
    """Return the confidences (runs, examples of D_f)."""
    return torch.tensor([run["confidence"] for run in runs])


def markdown(options: ClassifierBenchmark, rows: list[TableRow]) -> str:
    """Return the tables, each with its verdict, and what their numbers mean."""
    page = f"# Unlearning on {options.dataset}\n\n{LEGEND.format(seeds=options.seeds, **RELEARN)}"
    if options.shadows:
        page += SHADOWS.format(shadows=options.shadows)
    for forget in options.forget:
        mine = [row for row in rows if row.group == forget]
        page += f"\n## {forget}\n\n{as_markdown(mine)}\n{verdict(mine, AGAIN)}\n"
    return page


main = command("benchmark", "Compare all methods with Retrain.", ClassifierBenchmark, compare)

if __name__ == "__main__":
    run_main(main)
