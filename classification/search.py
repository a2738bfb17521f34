"""Choose every method's knobs on a validation forget set, with one budget: `python -m classification.search`.

The forget sets, networks and test data of the benchmark are not looked at: other seeds draw and train them, another
class is forgotten, and validation examples stand in for test examples. Writes every draw to a table and the best ones
to where the presets read them.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from erase_sd.common.cli import knob, parse, run_main
from erase_sd.common.files import write_atomic
from erase_sd.common.rng import generator


class Log(NamedTuple):
    """Uniform in the logarithm, from low to high."""

    low: float
    high: float


EPOCHS = (2, 5, 10)
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

    dataset: str = knob("digits", "data set")
    data_dir: str | None = knob(None, "folder with the data in their original format (default: the Hub)")
    forget: tuple[str, ...] = knob(
        ("random:0.1", "class:5"), "one forget set of each kind; of no class that a benchmark reports"
    )
    methods: tuple[str, ...] = knob(tuple(SPACES), "methods to search for")
    budget: int = knob(12, "draws per method and kind of forget set")
    seeds: int = knob(3, "runs per draw, each with a forget set and a trained network of its own")
    output_dir: str = knob("runs/search", "folder of the runs")
    table: str = knob("docs/results/search.csv", "file of every draw and its gap")
    processes: int = knob(2, "runs at a time")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, write the table of draws, and put the best ones into the presets."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Choose the knobs of every method on validation data."
    search = Search(**parse(argv, prog="search", description=text, search=Search)["search"])
    rows = results(search)
    out = io.StringIO()
    writer = csv.DictWriter(out, ["forget", "method", "gap", "knobs"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"knobs": json.dumps(row["knobs"]), "gap": f"{row['gap']:.3f}"} for row in rows)
    write_atomic(Path(search.table), out.getvalue())
    best = json.loads(TUNED.read_text()) if TUNED.is_file() else {}
    for row in sorted(rows, key=lambda row: -row["gap"]):  # the smallest gap comes last and stays
        best.setdefault(search.dataset, {}).setdefault(kind(row["forget"]), {})[row["method"]] = row["knobs"]
    write_atomic(TUNED, json.dumps(best, indent=2, sort_keys=True) + "\n")
    return 0


def kind(forget: str) -> str:
    """ "random" for "random:0.1": knobs are chosen by the kind of forget set."""
    return forget.partition(":")[0]


def draws(space: dict[str, Log | tuple], method: str, budget: int) -> list[dict[str, Any]]:
    """`budget` points of a space, the same for everybody."""
    points = []
    for i in range(budget):
        g = generator(0, "search", method, i)
        import torch

        u = torch.rand(len(space), generator=g, dtype=torch.float64).tolist()
        points.append({name: _value(where, x) for (name, where), x in zip(space.items(), u, strict=True)})
    return points


def _value(where: Log | tuple, x: float) -> Any:
    if isinstance(where, Log):
        return float(f"{where.low * (where.high / where.low) ** x:.3g}")
    return where[int(x * len(where))]


def results(search: Search) -> list[dict[str, Any]]:
    """One row per draw: forget, method, knobs, and the gap in percent to Retrain on validation data."""
    from classification.run.jobs import run_all

    common = {"dataset": search.dataset, "data_dir": search.data_dir, "output_dir": search.output_dir}
    seeds = range(FIRST, FIRST + search.seeds)
    jobs, rows = [], []
    for forget in search.forget:
        for method in ("retrain", *search.methods):
            points = [{}] if method == "retrain" else draws(SPACES[method], method, search.budget)
            for knobs in points:
                rows.append({"forget": forget, "method": method, "knobs": knobs})
                jobs += [
                    common | {"forget": forget, "method": method, **dict.fromkeys(SEEDS, s), **knobs} for s in seeds
                ]
    done = run_all(jobs, search.processes, "search")
    for i, row in enumerate(rows):
        mine = done[i * search.seeds : (i + 1) * search.seeds]
        row["mean"] = {axis: 100 * mean(r["scores"][axis] for r in mine) for axis in AXES}
    retrain = {row["forget"]: row["mean"] for row in rows if row["method"] == "retrain"}
    found = [row for row in rows if row["method"] != "retrain"]
    gap = lambda row: mean(abs(row["mean"][a] - retrain[row["forget"]][a]) for a in AXES)  # noqa: E731
    return [{"forget": r["forget"], "method": r["method"], "gap": gap(r), "knobs": r["knobs"]} for r in found]


if __name__ == "__main__":
    run_main(main)
