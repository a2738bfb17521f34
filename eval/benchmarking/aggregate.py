"""From results of rows to the standings of methods: means over seeds, then over concepts; pooled distances."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import harmonic_mean, mean, stdev
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from erase_sd.common.files import digest, write_atomic
from eval.benchmarking.rows import BenchmarkRow
from eval.benchmarking.suites import ORIGINAL
from eval.benchmarking.trial import features_file, reference
from eval.features.distances import frechet, kernel_distance, statistics

RATES = {"ua": "UA", "ira": "IRA", "cra": "CRA"}
RowResult = dict[str, Any]
Finished = Sequence[tuple[BenchmarkRow, RowResult]]
Values = dict[str, float | None]


class MethodScore(NamedTuple):
    """One method on one concept, or on all of them; rates in percent, None where a value is not known."""

    method: str
    concept: str | None  # None: the mean over those that every method has finished
    runs: int
    values: Values  # ua, ira, cra, mean (harmonic), other, fid, floor (fid in the original's), kid, drift, ...
    spread: Values  # sample standard deviation of ua, ira and cra over the seeds


def method_scores(finished: Finished, folder: Path) -> list[MethodScore]:
    """One for every method and concept, and one for every method over `common`, in the order of the rows."""
    distances = Distances(folder)
    groups: dict[tuple[str, str], list[tuple[BenchmarkRow, RowResult]]] = {}
    for row, result in finished:
        groups.setdefault((row.method, row.concept), []).append((row, result))
    single = [
        of_concept(group, groups.get((ORIGINAL, concept), []), distances) for (_, concept), group in groups.items()
    ]
    distances.write(row.key for row, _ in finished)
    methods, concepts = dict.fromkeys(s.method for s in single), common(single)
    everywhere = ([s for s in single if s.method == method and s.concept in concepts] for method in methods)
    return [*single, *map(overall, everywhere)]


def common(board: Sequence[MethodScore]) -> list[str]:
    """The concepts that every method has finished, which alone make means comparable; all, where there is none."""
    concepts = list(dict.fromkeys(s.concept for s in board if s.concept))
    done = {(s.method, s.concept) for s in board}
    shared = [concept for concept in concepts if all((s.method, concept) in done for s in board)]
    return shared or concepts


def of_concept(group: Finished, original: Finished, distances: Distances) -> MethodScore:
    """The standing of rows that differ in their seed alone, with the original's rows of these seeds as its floor."""
    rows, results = ([*side] for side in zip(*group, strict=True))
    rates = {key: [100 * r[name]["value"] for r in results] for key, name in RATES.items()}
    far = distances.of(rows)
    seeds = {row.seed for row in rows if far and row.key in far["rows"]}
    least = distances.of([row for row, _ in original if row.seed in seeds])
    same = far and least and far["n"] == least["n"] and least["fid"] > 0
    values: Values = {key: mean(x) for key, x in rates.items()}
    values |= {
        "mean": harmonic([values[key] for key in RATES]),
        "other": 100 * mean(r["other_share"] for r in results),
        "fid": far and far["fid"],
        "floor": far["fid"] / least["fid"] if same else None,
        "kid": far and 1000 * far["kid"],
        "drift": 1000 * mean(r["drift"] for r in results),
        "drift_rmse": mean(r["drift_rmse"] for r in results),
        "seconds": mean(r["seconds"] for r in results),
        "memory": max((r["peak_memory_mib"] for r in results if r["peak_memory_mib"]), default=None),
        "broken": sum(r["broken"] for r in results),
        "n": far and far["n"],
    }
    spread = {key: stdev(x) if len(x) > 1 else None for key, x in rates.items()}
    return MethodScore(rows[0].method, rows[0].concept, len(rows), values, spread)


def overall(single: list[MethodScore]) -> MethodScore:
    """The mean over the concepts, known where it is known of all of them; the harmonic mean is that of these means."""
    values: Values = {}
    for key in single[0].values:
        column = [s.values[key] for s in single]
        values[key] = None if None in column else mean(column)
    values["mean"] = harmonic([values[key] for key in RATES])
    return MethodScore(single[0].method, None, sum(s.runs for s in single), values, dict.fromkeys(RATES))


def harmonic(rates: Iterable[float]) -> float:
    """The harmonic mean of rates in percent, 0 if one of them is."""
    return harmonic_mean(list(rates))


def retention(standing: MethodScore) -> float:
    """Mean of IRA and CRA, in percent."""
    return mean((standing.values["ira"], standing.values["cra"]))


def front(points: dict[str, tuple[float, float]]) -> set[str]:
    """Names of the points (higher is better in both) to which no other is equal in one and better in the other."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points.values())
    }


def pareto(board: Iterable[MethodScore]) -> set[str]:
    """The methods on the front of erasure and retention; the original model erases nothing and is none."""
    return front({s.method: (s.values["ua"], retention(s)) for s in board if s.method != ORIGINAL})


def pooled(x: Tensor, y: Tensor) -> dict[str, float]:
    """FID and KID (all images, one subset) of features (N, D) to as many others."""
    return {
        "fid": frechet(statistics(x), statistics(y)),
        "kid": kernel_distance(x, y, size=len(x)).item(),
        "n": len(x),
    }


class Distances:
    """Distances of pooled rows, computed while their features are there and kept in distances.json without them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "distances.json"
        self.known: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def of(self, rows: list[BenchmarkRow]) -> dict[str, Any] | None:
        """FID and KID of all seeds' retain pictures together to the original's from other seeds.

        Where features are gone, finished on another machine, that of the most rows that were compared before; None
        if there is none.
        """
        keys = sorted(row.key for row in rows)
        files = [features_file(row, self.folder) for row in rows]
        if (name := digest(keys)) not in self.known:
            if not rows or not all(file.is_file() for file in files):
                return max(self._within(keys).values(), key=lambda entry: entry["n"], default=None)
            ours = torch.cat([load_file(file)["features"] for file in files])
            theirs = torch.cat([reference(r.concept, r.seed, r.pictures[1], self.folder) for r in rows])
            self.known[name] = pooled(ours, theirs) | {"rows": keys}
        return self.known[name]

    def write(self, keys: Iterable[str]) -> None:
        """Keep what is of these rows."""
        write_atomic(self.file, json.dumps(self._within(keys), indent=1) + "\n")

    def _within(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """What is known of these rows and no others."""
        rows = set(keys)
        return {name: entry for name, entry in self.known.items() if rows.issuperset(entry["rows"])}
