"""Rows of a benchmark: one method, one concept, one seed; the key under which a measured row is kept."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from erase_sd.common.cli import names
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, slug
from erase_sd.plan import make
from erase_sd.pocket.prompt_sets import HALF
from erase_sd.pocket.world import part_named
from eval.benchmarking.suites import DATA, ORIGINAL, REFERENCE, Suite


class BenchmarkRow(NamedTuple):
    """One method on one concept with one seed."""

    method: str  # as the tables call it
    concept: str  # "frog", "pencil style"
    seed: int
    pictures: tuple[int, int]  # of the concept, and of everything else
    job: tuple[str, ...]  # the main job's options; none for the original model
    config: dict[str, Any]
    key: str

    @property
    def file(self) -> str:
        """Where its result is kept."""
        return f"{slug(self.method.lower())}_{slug(self.concept)}_{self.seed}.json"


def rows(
    suite: Suite, methods: tuple[str, ...], concepts: tuple[str, ...], seeds: tuple[int, ...]
) -> list[BenchmarkRow]:
    """All rows, the first seed of every method and concept before the second; the original model leads each seed.

    Empty tuples stand for all that the suite has. Raises UserError for a method that the suite does not have or that
    nobody has registered, for an unknown concept, and as the methods' knobs do.
    """
    for name in methods:
        if name not in (ORIGINAL, *suite.methods):
            raise UserError(f"--methods {name!r} is not in this suite: it has {', '.join(suite.methods)}")
    chosen = [name for name in suite.methods if not methods or name in methods]
    named = list(dict.fromkeys(concept_of(text) for text in concepts or suite.concepts))
    return [
        row(suite, method, concept, seed)
        for seed in dict.fromkeys(seeds or suite.seeds)
        for method in (ORIGINAL, *chosen)
        for concept in named
    ]


def concept_of(text: str) -> str:
    """The concept as the tables call it: "neon" and "Neon style" are both "neon style"."""
    kind, word = part_named(text)
    return word if kind == "object" else f"{word} {kind}"


def row(suite: Suite, method: str, concept: str, seed: int) -> BenchmarkRow:
    """The row with its key."""
    pictures = suite.forget_pictures, suite.retain_pictures
    if seed >= REFERENCE or 2 * (seed + REFERENCE + 1) * pictures[1] > HALF:
        raise UserError(f"--seeds {seed} is too large: its pictures would be another seed's, give smaller ones")
    asked = {"concept": (concept,), "seed": seed}
    if method == ORIGINAL:
        job, config = (), {"method": ORIGINAL, "concept": concept, "seed": seed}
    else:
        # judged here, not there; a killed run begins anew, so that its time is whole
        values = asked | {"model": "pocket", "eval_forget": 0, "eval_retain": 0, "checkpointing_steps": 1_000_000}
        values = DATA | suite.methods[method] | values
        plan = make(**values)
        if suite.most_steps and "steps" in names(type(plan.method)) and plan.method.steps > suite.most_steps:
            plan = make(**values | {"steps": suite.most_steps})
        job, config = tuple(plan.options()), plan.config()
    return BenchmarkRow(method, concept, seed, pictures, job, config, digest([config, protocol(), pictures]))


@cache
def protocol() -> dict[str, Any]:
    """How rows are judged: model, judge, sampler, and what the distances compare."""
    from erase_sd.pocket.oracle import WEIGHTS
    from erase_sd.pocket.score import GUIDANCE, STEPS
    from eval.images.pipelines import weights_digest

    return {
        "model_sha256": weights_digest("pocket"),
        "judge_sha256": file_digest(WEIGHTS),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": "DDIM",
        "features": "pocket",  # of eval.extractors: the judge's pooled features
        "reference": "the original model on the same retain prompts with other seeds",
    }


def stored(row: BenchmarkRow, folder: Path) -> dict[str, Any] | None:
    """The result of a row; None if it is missing, or stale: of another key. Raises UserError for a damaged file."""
    file = folder / "rows" / row.file
    if not file.is_file():
        return None
    try:
        result = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it and run the same command again") from error
    return result if result.get("key") == row.key else None
