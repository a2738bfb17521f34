"""Rows of a benchmark: one method, one concept, one seed; the key under which a result counts, and where it is kept.

The key is the hash of everything that decides a row's numbers: all options of the job, the model's weights and the
protocol of the evaluation. A result with another key is stale and counts as missing.

While a suite is being measured, every finished row is a file of its own in the working folder, so that a killed
benchmark goes on where it was. Published results, docs/results/<suite>.jsonl, hold one row a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from erase_sd.common.cli import names
from erase_sd.common.errors import UserError
from erase_sd.common.files import digest, file_digest, slug, write_atomic
from erase_sd.plan import make
from erase_sd.pocket.oracle import WEIGHTS
from erase_sd.pocket.prompt_sets import HALF
from erase_sd.pocket.score import GUIDANCE, STEPS
from erase_sd.pocket.world import part_named
from eval.benchmarking.suites import DATA, ORIGINAL, REFERENCE, Suite
from eval.images.pipelines import weights_digest

RowResult = dict[str, Any]  # what trial.finish writes


class BenchmarkRow(NamedTuple):
    """One method on one concept with one seed."""

    method: str  # as the tables call it
    concept: str  # "frog", "pencil style"
    seed: int
    pictures: tuple[int, int]  # samples of the concept, and of everything else
    job: tuple[str, ...]  # the main job's options; none for the original model
    config: dict[str, Any]
    key: str

    @property
    def file(self) -> str:
        """Return the name of the file of its result in the working folder."""
        return file_name(self.method, self.concept, self.seed)


Finished = Sequence[tuple[BenchmarkRow, RowResult]]


def file_name(method: str, concept: str, seed: int) -> str:
    """Return the name of a row's file, which is also the row's identity among published results."""
    return f"{slug(method.lower())}_{slug(concept)}_{seed}.json"


def rows(
    suite: Suite, methods: tuple[str, ...], concepts: tuple[str, ...], seeds: tuple[int, ...]
) -> list[BenchmarkRow]:
    """Return all rows, the first seed of everything before the second; the original model leads each seed.

    Empty tuples stand for all that the suite has. Raises UserError for a method that the suite does not have or that
    nobody has registered, for an unknown concept, and as the methods' options do.
    """
    for name in methods:
        if name not in (ORIGINAL, *suite.methods):
            raise UserError(f"--methods {name!r} is not in this suite: it has {', '.join(suite.methods)}")
    chosen = [ORIGINAL]
    for name in suite.methods:
        if not methods or name in methods:
            chosen.append(name)
    named = dict.fromkeys(concept_of(text) for text in concepts or suite.concepts)
    found = []
    for seed in dict.fromkeys(seeds or suite.seeds):
        for method in chosen:
            for concept in named:
                found.append(row(suite, method, concept, seed))
    return found


def concept_of(text: str) -> str:
    """Return the concept as the tables call it: "neon" and "Neon style" are both "neon style"."""
    kind, word = part_named(text)
    return word if kind == "object" else f"{word} {kind}"


def row(suite: Suite, method: str, concept: str, seed: int) -> BenchmarkRow:
    """Return the row with its key. Raises UserError for a seed whose samples would be another seed's."""
    pictures = suite.forget_pictures, suite.retain_pictures
    if seed >= REFERENCE or 2 * (seed + REFERENCE + 1) * pictures[1] > HALF:
        raise UserError(f"--seeds {seed} is too large: its pictures would be another seed's, give smaller ones")
    given = {"concept": (concept,), "seed": seed}
    if method == ORIGINAL:
        job, config = (), {"method": ORIGINAL, "concept": concept, "seed": seed}
    else:
        # evaluated here, not in the job; a killed run begins anew, so that its time is whole
        values = given | {"model": "pocket", "eval_forget": 0, "eval_retain": 0, "checkpointing_steps": 1_000_000}
        values = DATA | suite.methods[method] | values
        plan = make(**values)
        if suite.most_steps and "steps" in names(type(plan.method)) and plan.method.steps > suite.most_steps:
            plan = make(**values | {"steps": suite.most_steps})
        job, config = tuple(plan.options()), plan.config()
    return BenchmarkRow(method, concept, seed, pictures, job, config, digest([config, protocol(), pictures]))


@cache
def protocol() -> dict[str, Any]:
    """Return how rows are evaluated: model, oracle, sampler, and what the distances compare."""
    return {
        "model_sha256": weights_digest("pocket"),
        "judge_sha256": file_digest(WEIGHTS),
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": "DDIM",
        "features": "pocket",  # of eval.features.extractors: the oracle's pooled features
        "reference": "the original model on the same retain prompts with other seeds",
    }


class Published(NamedTuple):
    """Results of a suite that were published: {file name: result of the row}, and the distances of pooled rows."""

    rows: dict[str, RowResult]
    distances: dict[str, dict[str, Any]]


def rows_file(place: Path, suite: str) -> Path:
    """Return the file that holds a suite's published rows, one a line."""
    return place / f"{suite}.jsonl"


def distances_file(place: Path, suite: str) -> Path:
    """Return the file that holds a suite's published distances, as the working folder's distances.json does."""
    return place / f"{suite}-distances.json"


def read_published(place: str | None, suite: str) -> Published:
    """Return what is published of a suite; nothing without a folder or file. Raises UserError for a damaged file."""
    results: dict[str, RowResult] = {}
    distances: dict[str, dict[str, Any]] = {}
    if place is None:
        return Published(results, distances)
    file = rows_file(Path(place), suite)
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                result = json.loads(line)
                results[file_name(result["method"], result["concept"], result["seed"])] = result
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"line {number} of {file} is damaged ({error}): restore the file") from error
    file = distances_file(Path(place), suite)
    if file.is_file():
        distances = read_json(file, "restore the file")
    return Published(results, distances)


def write_published(place: Path, suite: str, finished: Finished) -> None:
    """Write the rows' results into one file, one a line, in the order of the suite."""
    lines = [json.dumps(result) + "\n" for _, result in finished]
    write_atomic(rows_file(place, suite), "".join(lines))


def stored(row: BenchmarkRow, folder: Path, published: Mapping[str, RowResult]) -> RowResult | None:
    """Return the result of a row, from the working folder or else from the published ones.

    None if it is missing, or stale: of another key. Raises UserError for a damaged file.
    """
    file = folder / "rows" / row.file
    if file.is_file():
        result = read_json(file, "remove it and run the same command again")
        if result.get("key") == row.key:
            return result
    if row.file in published and published[row.file].get("key") == row.key:
        return published[row.file]
    return None


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Return the dict in a file. Raises UserError for a damaged file, with what to do about it."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): {remedy}") from error
