"""Choose every method's options on a validation forget set, with one budget: `python -m classification.search`.

The forget sets, networks and test data of the benchmark are not looked at: other seeds draw and train them, another
class is forgotten, and validation examples stand in for test examples. Writes every draw to a table and the best ones
to where the presets read them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch

from classification.plan import ClassifierPlan
from classification.run.jobs import run_all, unlearned
from erase_sd.common.cli import command, knob, run_main
from erase_sd.common.errors import LostModel
from erase_sd.common.files import write_atomic
from erase_sd.common.rng import generator


class Log(NamedTuple):
    """Uniform in the logarithm, from low to high."""

    low: float
    high: float


EPOCHS = (2, 5, 10)  # or those that are asked for
SPACES: dict[str, dict[str, Log | tuple]] = {
    "ft": {"lr": Log(1e-3, 2e-1), "epochs": EPOCHS},
    "ga": {"lr": Log(1e-4, 0.3), "epochs": EPOCHS},
    "iu": {"alpha": Log(0.1, 1000)},
    "be": {"lr": Log(1e-5, 1e-1), "epochs": EPOCHS},
    "bs": {"lr": Log(1e-5, 1e-1), "epochs": EPOCHS},
    "l1-sparse": {"lr": Log(1e-3, 2e-1), "l1": Log(1e-6, 1e-3), "epochs": EPOCHS},
    "salun": {"lr": Log(1e-4, 1e-1), "mask_fraction": (0.1, 0.3, 0.5, 0.8), "redirect_weight": Log(0.03, 1)}
    | {"epochs": EPOCHS},
    "neggrad+": {"lr": Log(1e-3, 1e-1), "alpha": (0.8, 0.9, 0.95, 0.99, 0.999), "epochs": EPOCHS},
    "scrub": {"lr": Log(1e-3, 0.3), "max_epochs": (1, 2, 3), "alpha": (0.05, 0.5, 1.0), "epochs": EPOCHS},
    "ssd": {"alpha": Log(1, 100), "lam": Log(0.1, 1)},
    "badt": {"lr": Log(1e-5, 1e-2), "retain_share": (0.3, 1.0), "epochs": EPOCHS},
    "lotus": {"lr": Log(1e-5, 1e-2), "alpha": Log(0.5, 32), "epochs": EPOCHS},
    "scissorhands": {"lr": Log(1e-3, 1e-1), "fraction": Log(1e-3, 1e-1), "lam": Log(3e-3, 0.3), "epochs": EPOCHS}
    | {"release_at": Log(0.02, 10)},
}

TUNED = Path(__file__).parent / "tuned.json"
AXES = ("acc_f", "acc_r", "acc_val", "mia_val")
FIRST = 1000  # seeds of a search; a benchmark counts from 0
SEEDS = ("forget_seed", "seed", "train_seed")


@dataclass(frozen=True, kw_only=True)
class Search:
    """What to search, and how hard."""

    dataset: str = knob("fashion", "data set")
    data_dir: str | None = knob(None, "folder with the data in their original format (default: the Hub)")
    forget: tuple[str, ...] = knob(
        ("random:0.1", "class:5"), "one forget set of each kind; of no class that a benchmark reports"
    )
    methods: tuple[str, ...] = knob(tuple(SPACES), "methods to search for")
    budget: int = knob(12, "draws per method and kind of forget set")
    epochs: tuple[int, ...] = knob(EPOCHS, "walks through the data to choose among")
    seeds: int = knob(3, "runs per draw, each with a forget set and a trained network of its own")
    output_dir: str = knob("runs/search", "folder of the runs")
    table: str = knob("docs/results/search_fashion.csv", "file of every draw and its gap")
    processes: int = knob(2, "runs at a time")


def tune(search: Search) -> None:
    """Run what is missing, write the table of draws, and put the best ones into the presets."""
    rows = results(search)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["forget", "method", "gap", "knobs"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"knobs": json.dumps(row["knobs"]), "gap": f"{row['gap']:.3f}"})
    write_atomic(Path(search.table), out.getvalue())
    best = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    for (forget, method), row in chosen(rows).items():
        best.setdefault(search.dataset, {}).setdefault(kind(forget), {})[method] = row["knobs"]
    write_atomic(TUNED, json.dumps(best, indent=2, sort_keys=True) + "\n")


def chosen(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the row of the smallest gap by (forget set, method).

    Gaps that a table cannot tell apart are ties: the draw wins that does better on the other forget sets.
    """
    total: dict[str, float] = {}
    for row in rows:
        total[_draw(row)] = total.get(_draw(row), 0.0) + row["gap"]

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        return round(row["gap"], 3), total[_draw(row)]

    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=rank, reverse=True):  # the best comes last and stays
        if row["method"] in SPACES:
            best[row["forget"], row["method"]] = row
    return best


def _draw(row: dict[str, Any]) -> str:
    """Return what the rows of one draw on several forget sets have in common."""
    return json.dumps([row["method"], row["knobs"]])


def kind(forget: str) -> str:
    """Return "random" for "random:0.1": options are chosen by the kind of forget set."""
    return forget.partition(":")[0]


def space_of(search: Search, method: str) -> dict[str, Log | tuple]:
    """Return the space of a method, with the numbers of epochs that the search allows."""
    space = dict(SPACES[method])
    if "epochs" in space:
        space["epochs"] = search.epochs
    return space


def draws(space: dict[str, Log | tuple], method: str, budget: int) -> list[dict[str, Any]]:
    """Draw `budget` points of a space, the same for everybody."""
    points = []
    for i in range(budget):
        g = generator(0, "search", method, i)
        u = torch.rand(len(space), generator=g, dtype=torch.float64).tolist()
        point = {}
        for (name, where), x in zip(space.items(), u, strict=True):
            point[name] = _value(where, x)
        points.append(point)
    return points


def _value(where: Log | tuple, x: float) -> Any:
    """Return the value of an option at x in [0, 1) of its range."""
    if isinstance(where, Log):
        return float(f"{where.low * (where.high / where.low) ** x:.3g}")
    return where[int(x * len(where))]


def results(search: Search) -> list[dict[str, Any]]:
    """Return one row per draw, and one of nothing done: forget, method, knobs, and the gap in percent to Retrain.

    The gap is one on validation data.
    """
    common = {"dataset": search.dataset, "data_dir": search.data_dir, "output_dir": search.output_dir}
    jobs: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for forget in search.forget:
        for method in ("retrain", "nothing", *search.methods):
            points = [{}]
            if method in SPACES:
                points = draws(space_of(search, method), method, search.budget)
            for point in points:
                rows.append({"forget": forget, "method": method, "knobs": point})
                for s in range(FIRST, FIRST + search.seeds):
                    jobs.append(common | {"forget": forget, "method": method, **dict.fromkeys(SEEDS, s), **point})
    done = run_all(jobs, search.processes, "search", tried)
    retrain: dict[str, dict[str, float]] = {}  # the scores that Retrain has, by forget set
    found = []
    for i, row in enumerate(rows):
        records = done[i * search.seeds : (i + 1) * search.seeds]
        if any("lost" in record for record in records):
            found.append(row | {"gap": math.inf})
            continue
        scores = _mean_scores(records)
        if row["method"] == "retrain":  # the first of its forget set
            retrain[row["forget"]] = scores
            continue
        gap = mean(abs(scores[axis] - retrain[row["forget"]][axis]) for axis in AXES)
        found.append(row | {"gap": gap})
    return found


def tried(plan: ClassifierPlan) -> dict[str, Any]:
    """Return the record of the plan's run, or how it lost the model: then its draw is out."""
    try:
        return unlearned(plan)
    except LostModel as error:
        return {"lost": str(error)}


def _mean_scores(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the means over these runs of what a search may look at, in %."""
    means = {}
    for axis in AXES:
        means[axis] = 100 * mean(record["scores"][axis] for record in records)
    return means


main = command("search", "Choose the options of every method on validation data.", Search, tune)

if __name__ == "__main__":
    run_main(main)
