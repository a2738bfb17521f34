"""What each part of Scissorhands contributes: the paper's Table 3, Fig. 2, Remark 1, and where the networks look.

`python -m classification.ablation`; Retrain and the networks that forget are those of `classification.benchmark`.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from classification.benchmark import job
from classification.reporting.tables import TableRow, as_csv, as_markdown, row
from erase_sd.common.cli import knob, parse, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic

PAPER = (
    Path(__file__).parent / "reporting" / "paper_ablation.csv"
)  # Table 3 of arXiv 2401.06187: CIFAR-10, random 10 %, in %
SALIENCIES: dict[str, dict[str, Any]] = {
    "SNIP, abs(theta g)": {"saliency": "abs"},
    "SNIP with its sign, Eq. 2": {"saliency": "signed"},
    "gradient, abs(g)": {"saliency": "gradient"},
    "magnitude, abs(theta)": {"saliency": "magnitude"},
    "chance": {"saliency": "random"},
    "last layer, all of it": {"trim_scope": "fc|classifier", "fraction": 1.0},
}
TABLE3, SALIENCY = "Table 3: projection and initialisation", "Remark 1: choice of the saliency"
PANELS = ("kept fraction k", "lambda", "share p of D_f used for trimming")
LOOKING = ("retrain", "salun", "scissorhands")  # the columns of the Grad-CAM sheet, beside the raw network's


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What to vary."""

    dataset: str = knob("digits", "digits, cifar10, cifar100, svhn or celeba")
    data_dir: str | None = knob(None, "folder with the data in their original format (default: the Hub)")
    forget: str = knob("random:0.1", "forget set")
    preset: str | None = knob(None, "values of everything that is not varied (default: the benchmark's)")
    seeds: int = knob(3, "runs of each, with seeds from 0 on")
    inits: tuple[str, ...] = knob(
        ("uniform", "normal", "zeros", "ones"), "initialisations, with and without projection"
    )
    kept: tuple[float, ...] = knob((0.9, 0.925, 0.95, 0.975, 0.99, 0.999, 1.0), "shares k of the weights that stay")
    lam: tuple[float, ...] = knob((0.0, 0.01, 0.05, 0.1, 0.3, 1.0), "weights lambda of the forget term")
    shares: tuple[float, ...] = knob((0.03, 0.1, 0.3, 0.6, 1.0), "shares p of D_f that saliency is measured on")
    output_dir: str = knob("runs/benchmark", "folder of the runs")
    report: str | None = knob(None, "folder of the table and the pictures (default: that of the runs)")
    processes: int = knob(2, "runs at a time, one thread each")

    def __post_init__(self) -> None:
        """Raise UserError for nothing to run."""
        for name in ("seeds", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} is too few: give 1 or more")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the table and the pictures."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Vary the parts of Scissorhands."
    options = Ablation(**parse(argv, prog="ablation", description=text, ablation=Ablation)["ablation"])
    tables, folders = results(options)
    from classification.reporting import figures

    place = Path(options.report or options.output_dir)
    file = lambda kind, suffix: place / f"{kind}_{options.dataset}{suffix}"  # noqa: E731
    retrain = tables[TABLE3]["retrain"]
    curves = {name: {float(x): r for x, r in tables[name].items() if x != "retrain"} for name in PANELS}
    page = "".join(f"## {name}\n\n{as_markdown(list(rows.values()))}\n" for name, rows in tables.items())
    page = f"# Scissorhands on {options.dataset}, {options.forget}, {options.seeds} seeds\n\n{page}"
    write_atomic(file("ablation", ".md"), page)
    write_atomic(file("ablation", ".csv"), as_csv((r for rows in tables.values() for r in rows.values()), "table"))
    figures.panels(curves, retrain, {"lambda"}, file("ablation", ".png"))
    figures.variants([r for name, r in tables[SALIENCY].items() if name != "retrain"], file("saliency", ".png"))
    sheet(options, folders).save(file("gradcam", ".png"))
    print(f"{page}\n{place}: ablation, saliency and gradcam of {options.dataset}")
    return 0


def variants(options: Ablation) -> dict[str, dict[str, dict[str, Any]]]:
    """Knobs by table and row."""
    pairs = {f"{init}, {p}": {"init": init, "projection": p} for init in options.inits for p in ("on", "off")}
    kept, lam, share = PANELS
    return {
        TABLE3: pairs,
        kept: {f"{k:g}": {"fraction": round(1 - k, 9)} for k in options.kept},
        lam: {f"{x:g}": {"lam": x} for x in options.lam},
        share: {f"{p:g}": {"trim_share": p} for p in options.shares},
        SALIENCY: SALIENCIES,
    }


def results(options: Ablation) -> tuple[dict[str, dict[str, TableRow]], dict[str, dict[str, Any]]]:
    """The rows by table and name, Retrain's first in each; and the first seed's records by method of LOOKING."""
    from classification.run.jobs import run_all
    from classification.run.measure import measured

    seeds = range(options.seeds)
    preset = {"preset": options.preset} if options.preset else {}
    wanted = {("", name, s): job(options, options.forget, name, s) for name in LOOKING for s in seeds}
    for title, rows in variants(options).items():
        for name, knobs in rows.items():
            ours = [job(options, options.forget, "scissorhands", s) | preset | knobs for s in seeds]
            wanted |= {(title, name, s): values for s, values in zip(seeds, ours, strict=True)}
    found = run_all(wanted.values(), options.processes, "ablation", partial(measured, relearning=True))
    done = dict(zip(wanted, found, strict=True))
    retrain = [done["", "retrain", s] for s in seeds]
    theirs = paper() if (options.dataset, options.forget) == ("cifar10", "random:0.1") else {}
    tables = {
        title: {"retrain": row("retrain", title, retrain, retrain)}
        | {
            name: row(name, title, [done[title, name, s] for s in seeds], retrain, paper=theirs.get(name))
            for name in rows
        }
        for title, rows in variants(options).items()
    }
    return tables, {name: done["", name, 0] for name in LOOKING}


def paper() -> dict[str, dict[str, float]]:
    """The paper's Table 3 by the names of our rows, in %."""
    with PAPER.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {f"{r.pop('init')}, {r.pop('projection')}": {k: float(v) for k, v in r.items()} for r in rows}


def sheet(options: Ablation, folders: dict[str, dict[str, Any]]) -> Any:
    """Grad-CAM of the networks of these records, and of the one before, on examples of D_f and D_r."""
    import torch

    from classification.data.partition import partition
    from classification.metrics.gradcam import figure
    from classification.plan import make
    from classification.run.measure import finished

    plan = make(**job(options, options.forget, "scissorhands", 0))
    cut = partition(plan.data)
    places = {"original": folders["scissorhands"]["raw_folder"]} | {k: r["folder"] for k, r in folders.items()}
    models = {name: finished(plan, cut, place) for name, place in places.items()}
    few = [part.take(torch.arange(min(4, len(part)))) for part in (cut.forget, cut.retain)]
    return figure(models, *few, scale=max(1, 96 // cut.forget.pixels.shape[-1]))


if __name__ == "__main__":
    run_main(main)
