"""What a saliency selects, before any repair: `python -m eval.selectivity --concepts cat "neon style"`, minutes.

For every saliency, concept and seed, the top k of the pocket model's default are taken and re-initialised:

    others     share of the selected entries that it also selects for another of the concepts, mean over those
    retained   share that SNIP on the retain data, |theta g_r|, selects at the same k: what everything shares
    L_f, L_r   forget and retain loss after the trim, in units of those before it
    gap        (L_a - L_f) / L_f after the trim: how much better than the anchor's words the concept's still explain it
    cos        of g_r to g_f, and of g_r to g_f - g_a, after the trim: where it is above 0, the projection on it takes
               its square out of |g_r|^2, which is repair

g_a and L_a belong to the forget set's noisy latents under the anchor's caption. Training images are sampled once, into
.cache.
"""

from __future__ import annotations

import csv
import dataclasses
import io
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

from erase_sd.common.cli import at_least, command, knob, run_main
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

COLUMNS = {  # of a TrimResult: head in the table, factor, digits
    "others": ("others, %", 100, 1),
    "retained": ("retained, %", 100, 1),
    "forget": ("L_f, x", 1, 2),
    "retain": ("L_r, x", 1, 2),
    "gap": ("gap, %", 100, 1),
    "cos_forget": ("cos g_r, g_f", 1, 2),
    "cos_contrast": ("cos g_r, g_f - g_a", 1, 2),
}
Masks = dict[str, Tensor]  # {parameter: bool of its shape, the selected entries}


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


def compare(options: Selectivity) -> None:
    """Measure, write and print the table. Raises UserError for an unknown concept, saliency or scope."""
    found = trim_results(options)
    folder = Path(options.output_dir)
    page = markdown(found, options)
    write_atomic(folder / "selectivity.csv", as_csv(found))
    write_atomic(folder / "selectivity.md", page)
    print(f"{page}\n{folder}: selectivity.csv, .md")


def as_csv(found: list[TrimResult]) -> str:
    """Return a line per scope, saliency, concept and seed; shares in [0, 1]."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(TrimResult._fields)
    for result in found:
        writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in result])
    return out.getvalue()


def markdown(found: list[TrimResult], options: Selectivity) -> str:
    """Return mean and standard deviation over concepts and seeds, a line per scope and saliency."""
    groups: dict[tuple[str, str], list[TrimResult]] = {}
    for result in found:
        groups.setdefault((result.scope, result.saliency), []).append(result)
    heads = ["scope", "saliency", "k", *(head for head, *_ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (scope, saliency), group in groups.items():
        cells = [scope, saliency, f"{group[0].k:,}"]
        for key, (_, factor, digits) in COLUMNS.items():
            cells.append(_cell([getattr(result, key) for result in group], factor, digits))
        lines.append(f"| {' | '.join(cells)} |")
    runs = (
        f"{len(options.concepts)} concepts ({', '.join(options.concepts)}), seeds {', '.join(map(str, options.seeds))}"
    )
    text = f"Mean ± standard deviation over {runs}; the terms are explained in `eval/selectivity.py`."
    return f"# What each saliency selects on the pocket model\n\n{text}\n\n" + "\n".join(lines) + "\n"


def _cell(values: list[float], factor: float, digits: int) -> str:
    text = f"{factor * mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {factor * stdev(values):.{digits}f}"
    return text


def trim_results(options: Selectivity) -> list[TrimResult]:
    """Return every combination, scope by scope. Raises UserError for an unknown concept, saliency or scope."""
    scopes, saliencies, concepts = options.scopes, options.saliencies, options.concepts
    plans: dict[tuple[str, int, str], Plan] = {}
    for scope, seed, concept in product(scopes, options.seeds, concepts):
        plans[scope, seed, concept] = _plan(scope, seed, concept, saliencies)
    found: list[TrimResult] = []
    bar = tqdm(total=len(plans) * len(saliencies), desc="selectivity", unit="trim")
    for scope, seed in product(scopes, options.seeds):
        selected: dict[tuple[str, str], Masks] = {}
        measured: dict[tuple[str, str], dict[str, Any]] = {}
        for concept in concepts:
            plan = plans[scope, seed, concept]
            pipe, samples = _training_data(plan, Path(options.output_dir))
            task = DenoisingTask(pipe, samples, plan.used_losses(), seed, accelerator("no"))
            for saliency, masks, values in trims(task, plan, saliencies, options.batches):
                selected[saliency, concept] = masks
                measured[saliency, concept] = values
                bar.update()
        for (saliency, concept), values in measured.items():
            others = _others(selected, saliency, concept)
            found.append(TrimResult(scope, saliency, concept, seed, others=others, **values))
    return sorted(found, key=lambda result: (scopes.index(result.scope), saliencies.index(result.saliency)))


def _plan(scope: str, seed: int, concept: str, saliencies: tuple[str, ...]) -> Plan:
    """Return the default's plan in another scope; refuse now what it would refuse after an hour."""
    given = {"model": "pocket", "concept": concept, "seed": seed, "trim_scope": scope, "anchor_pictures": False}
    for saliency in saliencies:
        make(**given, saliency=saliency)
    plan = make(**given)
    resolve(plan.job)
    return plan


def _training_data(plan: Plan, folder: Path) -> tuple[Any, Samples]:
    """Return the pocket model, and its own samples of the forget and retain prompts."""
    pipe = load(str(FOLDER))
    target = resolve(plan.job)
    model_hash = weights_digest("pocket")
    return pipe, collect(pipe, target.sources, plan.sampling, plan.job.seed, model_hash, folder / ".cache")


def trims(
    task: DenoisingTask, plan: Plan, saliencies: tuple[str, ...], batches: int
) -> Generator[tuple[str, Masks, dict[str, Any]]]:
    """Yield (saliency, what it selects, the numbers of its trim); the task's weights are as before after each."""
    theta = task.ranked()
    method = plan.method
    whole = {name: p.detach().clone() for name, p in theta.items()}
    before = _losses(task, batches)
    passes = {"g_r": (task.retain, lambda g: g)}
    g_r = _last(averages(task, passes, theta, method.sensitivity_batches))["g_r"]
    k = round(method.fraction * entries(g_r, task.shards))
    shared = top_k(connection_sensitivity(theta, g_r), k, shards=task.shards)
    for saliency in saliencies:
        scores = _last(dataclasses.replace(method, saliency=saliency).sensitivity(task))
        masks = top_k(scores, k, shards=task.shards)
        reinitialise_(task.trimmable(), masks, method.init, task.seed, task.shards)
        after = _losses(task, batches)
        values = {
            "k": k,
            "retained": overlap(masks, shared),
            "forget": after["forget"] / before["forget"],
            "retain": after["retain"] / before["retain"],
            "gap": -after["contrast"] / after["forget"],
        }
        values |= _cosines(task, batches)
        with torch.no_grad():
            for name, p in theta.items():
                p.copy_(whole[name])
        yield saliency, masks, values


def _last(steps: Generator[Any, None, Any]) -> Any:
    """Return what a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _losses(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Return the means over the first `batches` batches that no saliency has seen."""
    losses = {"forget": task.forget, "retain": task.retain, "contrast": task.contrast}
    fixed = [task.batch("selectivity", step) for step in range(batches)]
    means = {}
    for name, loss in losses.items():
        means[name] = sum(measure(task, loss, batch, name) for batch in fixed) / batches
    return means


def _cosines(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Return the retain gradient's mean cosines to the two constraints', as a step of the repair has them."""
    totals = {"cos_forget": 0.0, "cos_contrast": 0.0}
    for step in range(batches):
        batch = task.batch("selectivity", step)
        theta = task.trainable()
        g_r = gradient(task, task.retain, batch, theta)
        for name, loss in (("cos_forget", task.forget), ("cos_contrast", task.contrast)):
            along, norm2, norm2_f = products(g_r, gradient(task, loss, batch, theta)).tolist()
            totals[name] += along / sqrt(norm2 * norm2_f) / batches
    return totals


def overlap(masks: Masks, others: Masks) -> float:
    """Return the share of the selected entries that the others select too. Raises UserError if none is selected."""
    chosen, common = 0, 0
    for name, mask in masks.items():
        chosen += int(mask.sum())
        common += int((mask & others[name]).sum())
    if not chosen:
        raise UserError("nothing is selected: the scope has too few entries for the default's --fraction")
    return common / chosen


def _others(selected: dict[tuple[str, str], Masks], saliency: str, concept: str) -> float:
    """Return the mean overlap with what the same saliency selects for the other concepts."""
    overlaps = []
    for (name, other), masks in selected.items():
        if name == saliency and other != concept:
            overlaps.append(overlap(selected[saliency, concept], masks))
    return sum(overlaps) / len(overlaps)


main = command("eval.selectivity", "Measure what saliencies select on the pocket model.", Selectivity, compare)

if __name__ == "__main__":
    run_main(main)
