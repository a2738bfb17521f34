"""What each part of Scissorhands contributes: the paper's Table 3, Fig. 2, Remark 1, and where the networks look.

`python -m classification.ablation`; Retrain and the networks that forget are those of `classification.benchmark`, and
so are the options, but nothing is released: with `release_at` ascent and projection would rest in most steps, and
neither lambda nor the projection could show.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from classification.benchmark import job
from classification.data.partition import partition
from classification.metrics.gradcam import figure
from classification.plan import make
from classification.reporting import figures
from classification.reporting.tables import TableRow, as_csv, as_markdown, row
from classification.run.jobs import run_all
from classification.run.measure import finished, measured
from erase_sd.common.cli import command, knob, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic

# Table 3 of arXiv 2401.06187: CIFAR-10, random 10 %, in %
PAPER = Path(__file__).parent / "reporting" / "paper_ablation.csv"
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

    dataset: str = knob("fashion", "fashion, digits, cifar10, cifar100, svhn, celeba, fashion-mnist, mnist or kmnist")
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


def ablate(options: Ablation) -> None:
    """Run what is missing, then write the table and the plots."""
    tables, records = results(options)
    place = Path(options.report or options.output_dir)
    page = f"# Scissorhands on {options.dataset}, {options.forget}, {options.seeds} seeds\n\n"
    all_rows: list[TableRow] = []
    for title, rows in tables.items():
        page += f"## {title}\n\n{as_markdown(list(rows.values()))}\n"
        all_rows += rows.values()
    write_atomic(place / f"ablation_{options.dataset}.md", page)
    write_atomic(place / f"ablation_{options.dataset}.csv", as_csv(all_rows, "table"))
    curves = {}
    for title in PANELS:
        rows = _varied(tables[title])
        curves[title] = {float(value): row for value, row in rows.items()}
    retrain = tables[TABLE3]["retrain"]
    figures.panels(curves, retrain, {"lambda"}, place / f"ablation_{options.dataset}.png")
    saliencies = list(_varied(tables[SALIENCY]).values())
    figures.variants(saliencies, place / f"saliency_{options.dataset}.png")
    gradcam_sheet(options, records).save(place / f"gradcam_{options.dataset}.png")
    print(f"{page}\n{place}: ablation, saliency and gradcam of {options.dataset}")


def _varied(rows: dict[str, TableRow]) -> dict[str, TableRow]:
    """Return the rows of Scissorhands alone."""
    return {name: row for name, row in rows.items() if name not in ("retrain", "nothing")}


def variants(options: Ablation) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the options that are varied, by table and row."""
    pairs: dict[str, dict[str, Any]] = {}
    for init in options.inits:
        for projection in ("on", "off"):
            pairs[f"{init}, {projection}"] = {"init": init, "projection": projection}
    kept, lam, share = PANELS
    return {
        TABLE3: pairs,
        kept: {f"{k:g}": {"fraction": round(1 - k, 9)} for k in options.kept},
        lam: {f"{x:g}": {"lam": x} for x in options.lam},
        share: {f"{p:g}": {"trim_share": p} for p in options.shares},
        SALIENCY: SALIENCIES,
    }


def results(options: Ablation) -> tuple[dict[str, dict[str, TableRow]], dict[str, dict[str, Any]]]:
    """Return (rows by table and name, the first seed's records by method of LOOKING).

    The first rows of each table are Retrain's and that of nothing done.
    """
    records = _records(options)
    retrain = records["", "retrain"]
    theirs: dict[str, dict[str, float]] = {}
    if (options.dataset, options.forget) == ("cifar10", "random:0.1"):
        theirs = paper()
    tables: dict[str, dict[str, TableRow]] = {}
    for title, rows in variants(options).items():
        tables[title] = {"retrain": row("retrain", title, retrain, retrain)}
        tables[title]["nothing"] = row("nothing", title, records["", "nothing"], retrain)
        for name in rows:
            tables[title][name] = row(name, title, records[title, name], retrain, paper=theirs.get(name))
    return tables, {name: records["", name][0] for name in LOOKING}


def _records(options: Ablation) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the records by table, "" for LOOKING's, and row, in the order of the seeds; what is missing is run."""
    preset = {"preset": options.preset} if options.preset else {}
    keys: list[tuple[str, str]] = []
    wanted: list[dict[str, Any]] = []
    for name in ("nothing", *LOOKING):
        for s in range(options.seeds):
            keys.append(("", name))
            wanted.append(job(options, options.forget, name, s))
    for title, rows in variants(options).items():
        for name, varied in rows.items():
            for s in range(options.seeds):
                keys.append((title, name))
                own = job(options, options.forget, "scissorhands", s)
                wanted.append(own | preset | {"release_at": None} | varied)
    found = run_all(wanted, options.processes, "ablation", partial(measured, relearning=True))
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, record in zip(keys, found, strict=True):
        records.setdefault(key, []).append(record)
    return records


def paper() -> dict[str, dict[str, float]]:
    """Return the paper's Table 3 by the names of our rows, in %."""
    table = {}
    with PAPER.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            name = f"{line.pop('init')}, {line.pop('projection')}"
            table[name] = {column: float(text) for column, text in line.items()}
    return table


def gradcam_sheet(options: Ablation, records: dict[str, dict[str, Any]]) -> Image.Image:
    """Return Grad-CAM of the original model and the networks of these records, on examples of D_f and D_r."""
    plan = make(**job(options, options.forget, "scissorhands", 0))
    parts = partition(plan.data)
    models = {"original": finished(plan, parts, records["scissorhands"]["raw_folder"])}
    for name, record in records.items():
        models[name] = finished(plan, parts, record["folder"])
    first = torch.arange(4)
    forget = parts.forget.take(first[: len(parts.forget)])
    retain = parts.retain.take(first[: len(parts.retain)])
    return figure(models, forget, retain, scale=max(1, 96 // forget.pixels.shape[-1]))


main = command("ablation", "Vary the parts of Scissorhands.", Ablation, ablate)

if __name__ == "__main__":
    run_main(main)
