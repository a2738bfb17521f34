"""What a saliency selects, before any repair: `python -m eval.selectivity --concepts cat "neon style"`, minutes.

For every saliency, concept and seed, the top k of the pocket model's default are taken and re-initialised:

    others     share of the selected entries that it also selects for another of the concepts, mean over those
    retained   share that SNIP on the retain data, |theta g_r|, selects at the same k: what everything shares
    L_f, L_r   forget and retain loss after the trim, in units of those before it
    gap        (L_a - L_f) / L_f after the trim: how much better than the anchor's words the concept's still explain it
    cos        of g_r to g_f, and of g_r to g_f - g_a, after the trim: where it is above 0, the projection on it takes
               its square out of |g_r|^2, which is repair

g_a and L_a belong to the forget set's noisy latents under the anchor's caption. Pictures are drawn once, into .cache.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import sys
from collections.abc import Generator
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.common.cli import at_least, knob, parse, quiet, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from erase_sd.common.processes import accelerator
from erase_sd.core.descent import measure
from erase_sd.core.projection import products
from erase_sd.core.sensitivity import averages, connection_sensitivity, entries, top_k
from erase_sd.core.task import gradient
from erase_sd.core.trim import reinitialise_
from erase_sd.denoising.concept import resolve
from erase_sd.denoising.samples import Samples, collect
from erase_sd.denoising.task import DenoisingTask
from erase_sd.models.pipeline import load
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER
from eval.images.pipelines import weights_digest

COLUMNS = {  # of a Cut: head in the table, factor, digits
    "others": ("others, %", 100, 1),
    "retained": ("retained, %", 100, 1),
    "forget": ("L_f, x", 1, 2),
    "retain": ("L_r, x", 1, 2),
    "gap": ("gap, %", 100, 1),
    "cos_forget": ("cos g_r, g_f", 1, 2),
    "cos_contrast": ("cos g_r, g_f - g_a", 1, 2),
}


@dataclass(frozen=True, kw_only=True)
class Selectivity:
    """What to select for."""

    concepts: tuple[str, ...] = knob(
        ("cat", "neon style", "blue background"), "two or more concepts of the pocket model"
    )
    saliencies: tuple[str, ...] = knob(
        ("abs", "contrast", "gradient", "magnitude", "random"), "of --method scissorhands"
    )
    scopes: tuple[str, ...] = knob(("attn", "full"), "parameters that are ranked and trimmed: groups of --trim_scope")
    seeds: tuple[int, ...] = knob((0, 1, 2), "of pictures, batches and new values")
    batches: int = knob(8, "batches over which losses and cosines after the trim are averaged")
    output_dir: str = knob("runs/selectivity", "folder of selectivity.csv and .md, and of the pictures' .cache")

    def __post_init__(self) -> None:
        """Raise UserError for numbers out of range, and for a comparison of one concept."""
        at_least(self, 1, "batches")
        if len(set(self.concepts)) < 2 or not (self.saliencies and self.scopes and self.seeds):
            raise UserError(
                f"--concepts {' '.join(self.concepts)} leaves nothing to compare: give two or more concepts"
            )


def main(argv: list[str] | None = None) -> int:
    """Measure, write and print the table."""
    argv = sys.argv[1:] if argv is None else argv
    text = "Measure what saliencies select on the pocket model."
    options = Selectivity(
        **parse(argv, prog="eval.selectivity", description=text, selectivity=Selectivity)["selectivity"]
    )
    quiet()
    from eval.selectivity import trim_results

    found = trim_results(
        options.concepts, options.saliencies, options.scopes, options.seeds, options.batches, options.output_dir
    )
    folder = Path(options.output_dir)
    write_atomic(folder / "selectivity.csv", as_csv(found))
    write_atomic(folder / "selectivity.md", page := markdown(found, options))
    print(f"{page}\n{folder}: selectivity.csv, .md")
    return 0


def as_csv(found: list[TrimResult]) -> str:
    """A line per scope, saliency, concept and seed; shares in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(found[0]._fields)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in cut] for cut in found)
    return out.getvalue()


def markdown(found: list[TrimResult], options: Selectivity) -> str:
    """Mean and standard deviation over concepts and seeds, a line per scope and saliency."""
    heads = ["scope", "saliency", "k", *(head for head, *_ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for scope, saliency in dict.fromkeys((cut.scope, cut.saliency) for cut in found):
        group = [cut for cut in found if (cut.scope, cut.saliency) == (scope, saliency)]
        cells = [_cell([getattr(cut, key) for cut in group], *how) for key, (_, *how) in COLUMNS.items()]
        lines.append(f"| {' | '.join([scope, saliency, f'{group[0].k:,}', *cells])} |")
    runs = (
        f"{len(options.concepts)} concepts ({', '.join(options.concepts)}), seeds {', '.join(map(str, options.seeds))}"
    )
    text = f"Mean ± standard deviation over {runs}; the terms are explained in `eval/selectivity.py`."
    return f"# What each saliency selects on the pocket model\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _cell(values: list[float], factor: float, digits: int) -> str:
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * mean(values):.{digits}f}{spread}"


if __name__ == "__main__":
    run_main(main)

Masks = dict[str, Tensor]


class TrimResult(NamedTuple):
    """One saliency's selection for one concept; losses in units of those before the trim."""

    scope: str
    saliency: str
    concept: str
    seed: int
    k: int
    others: float
    retained: float
    forget: float
    retain: float
    gap: float
    cos_forget: float
    cos_contrast: float


def trim_results(
    concepts: tuple[str, ...],
    saliencies: tuple[str, ...],
    scopes: tuple[str, ...],
    seeds: tuple[int, ...],
    batches: int,
    folder: str,
) -> list[TrimResult]:
    """Every combination, scope by scope. Raises UserError for an unknown concept, saliency or scope."""
    plans = {key: _plan(*key, saliencies) for key in product(scopes, seeds, concepts)}
    found: list[TrimResult] = []
    bar = tqdm(total=len(plans) * len(saliencies), desc="selectivity", unit="trim")
    for scope, seed in product(scopes, seeds):
        selected: dict[tuple[str, str], Masks] = {}
        measured: dict[tuple[str, str], dict[str, Any]] = {}
        for concept in concepts:
            plan = plans[scope, seed, concept]
            task = DenoisingTask(*_taught(plan, Path(folder)), plan.used_losses(), seed, accelerator("no"))
            for saliency, masks, values in trims(task, plan, saliencies, batches):
                selected[saliency, concept], measured[saliency, concept] = masks, values
                bar.update()
        found += [
            TrimResult(scope, saliency, concept, seed, others=_others(selected, saliency, concept), **values)
            for (saliency, concept), values in measured.items()
        ]
    return sorted(found, key=lambda cut: (scopes.index(cut.scope), saliencies.index(cut.saliency)))


def _plan(scope: str, seed: int, concept: str, saliencies: tuple[str, ...]) -> Plan:
    """The default's plan in another scope; refuses now what it would refuse after an hour."""
    given = {"model": "pocket", "concept": concept, "seed": seed, "trim_scope": scope, "anchor_pictures": False}
    for saliency in saliencies:
        make(**given, saliency=saliency)
    plan = make(**given)
    resolve(plan.job)
    return plan


def _taught(plan: Plan, folder: Path) -> tuple[Any, Samples]:
    """The pocket model and what it is taught from."""
    pipe, asked = load(str(FOLDER)), resolve(plan.job)
    return pipe, collect(
        pipe, asked.sources, plan.sampling, plan.job.seed, weights_digest("pocket"), folder / ".cache"
    )


def trims(task: DenoisingTask, plan: Plan, saliencies: tuple[str, ...], batches: int) -> Generator[Any]:
    """(saliency, what it selects, the numbers of its trim); the task's weights are as before after each."""
    theta, knobs = task.ranked(), plan.method
    whole = {name: p.detach().clone() for name, p in theta.items()}
    before = _losses(task, batches)
    passes = {"g_r": (task.retain, lambda g: g)}
    g_r = _last(averages(task, passes, theta, knobs.sensitivity_batches))["g_r"]
    k = round(knobs.fraction * entries(g_r, task.shards))
    common = top_k(connection_sensitivity(theta, g_r), k, shards=task.shards)
    for saliency in saliencies:
        scores = _last(dataclasses.replace(knobs, saliency=saliency).sensitivity(task))
        masks = top_k(scores, k, shards=task.shards)
        reinitialise_(task.trimmable(), masks, knobs.init, task.seed, task.shards)
        after = _losses(task, batches)
        values = {name: after[name] / before[name] for name in ("forget", "retain")}
        values |= {"gap": -after["contrast"] / after["forget"]} | _cosines(task, batches)
        with torch.no_grad():
            for name, p in theta.items():
                p.copy_(whole[name])
        yield saliency, masks, {"k": k, "retained": overlap(masks, common)} | values


def _last(steps: Generator[Any, None, Any]) -> Any:
    """What a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _losses(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Means over the first `batches` batches that no saliency has seen."""
    losses = {"forget": task.forget, "retain": task.retain, "contrast": task.contrast}
    drawn = [task.batch("selectivity", b) for b in range(batches)]
    return {name: sum(measure(task, L, batch, name) for batch in drawn) / batches for name, L in losses.items()}


def _cosines(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Of the retain gradient to the two constraints' on the same batch, as a step of the repair has them; means."""
    totals = {"cos_forget": 0.0, "cos_contrast": 0.0}
    for b in range(batches):
        batch, theta = task.batch("selectivity", b), task.trainable()
        g_r = gradient(task, task.retain, batch, theta)
        for name, loss in (("cos_forget", task.forget), ("cos_contrast", task.contrast)):
            along, norm2, norm2_f = products(g_r, gradient(task, loss, batch, theta)).tolist()
            totals[name] += along / sqrt(norm2 * norm2_f) / batches
    return totals


def overlap(masks: Masks, others: Masks) -> float:
    """The share of the selected entries that the others select too."""
    chosen = sum(int(mask.sum()) for mask in masks.values())
    if not chosen:
        raise UserError("nothing is selected: the scope has too few entries for the default's --fraction")
    return sum(int((mask & others[name]).sum()) for name, mask in masks.items()) / chosen


def _others(selected: dict[tuple[str, str], Masks], saliency: str, concept: str) -> float:
    """Mean overlap with what the same saliency selects for the other concepts."""
    rest = [masks for (one, other), masks in selected.items() if one == saliency and other != concept]
    return sum(overlap(selected[saliency, concept], masks) for masks in rest) / len(rest)
