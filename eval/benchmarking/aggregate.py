"""From results of rows to scores of methods: means over seeds, then over concepts; distances of pooled features."""

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
from erase_sd.pocket.score import wilson
from eval.benchmarking.rows import BenchmarkRow, Finished, RowResult, read_json
from eval.benchmarking.suites import ORIGINAL
from eval.benchmarking.trial import features_file, reference
from eval.features.distances import frechet, kernel_distance, statistics

RATES = {"ua": "UA", "ira": "IRA", "cra": "CRA"}
Values = dict[str, float | None]


class MethodScore(NamedTuple):
    """One method on one concept, or on all of them; rates in percent, None where a value is not known."""

    method: str
    concept: str | None  # None: the mean over those that every method has finished
    runs: int
    values: Values  # ua, ira, cra, mean (harmonic), other, fid, fid_above (the original's), kid, drift, ...
    spread: Values  # over trainings: sample standard deviation of ua, ira, cra and mean over the seeds
    interval: dict[str, tuple[float, float]]  # over pictures: Wilson's 95 % of ua, ira and cra


def method_scores(
    finished: Finished, folder: Path, published: dict[str, dict[str, Any]] | None = None
) -> list[MethodScore]:
    """Return a score for every method and concept, then one for every method over the `common` concepts.

    Distances are kept in the working folder's distances.json; those that were published count as known.
    """
    distances = Distances(folder, published or {})
    groups: dict[tuple[str, str], list[tuple[BenchmarkRow, RowResult]]] = {}
    keys = []
    for row, result in finished:
        groups.setdefault((row.method, row.concept), []).append((row, result))
        keys.append(row.key)
    board = []
    for (_, concept), group in groups.items():
        board.append(concept_score(group, groups.get((ORIGINAL, concept), []), distances))
    distances.write(keys)
    shared = common(board)
    comparable: dict[str, list[MethodScore]] = {}
    for score in board:
        scores = comparable.setdefault(score.method, [])
        if score.concept in shared:
            scores.append(score)
    for method, scores in comparable.items():
        of_method = [result for row, result in finished if row.method == method and row.concept in shared]
        board.append(overall(scores, of_method))
    return board


def common(board: Sequence[MethodScore]) -> list[str]:
    """Return the concepts that every method has finished, which alone make means comparable; all, if there is none."""
    methods = set()
    finished_by: dict[str, set[str]] = {}
    for score in board:
        methods.add(score.method)
        if score.concept:
            finished_by.setdefault(score.concept, set()).add(score.method)
    shared = []
    for concept, done in finished_by.items():
        if done == methods:
            shared.append(concept)
    return shared or list(finished_by)


def concept_score(group: Finished, original: Finished, distances: Distances) -> MethodScore:
    """Return the score of rows that differ in their seed alone; `original` holds the original model's rows.

    FID is also given above the floor, which is the original model's over the same seeds.
    """
    rows, results = [], []
    for row, result in group:
        rows.append(row)
        results.append(result)
    values: Values = {}
    for key, name in RATES.items():
        values[key] = mean(100 * result[name]["value"] for result in results)
    values["mean"] = harmonic([values["ua"], values["ira"], values["cra"]])
    values["other"] = 100 * average(results, "other_share")
    values |= distance_values(rows, original, distances)
    values["drift"] = 1000 * average(results, "drift")
    values["drift_rmse"] = average(results, "drift_rmse")
    values["seconds"] = average(results, "seconds")
    values["memory"] = None
    values["broken"] = 0
    for result in results:
        if result["peak_memory_mib"]:
            values["memory"] = max(values["memory"] or 0, result["peak_memory_mib"])
        values["broken"] += result["broken"]
    return MethodScore(rows[0].method, rows[0].concept, len(rows), values, spread_of(results), intervals(results))


def spread_of(results: Sequence[RowResult]) -> Values:
    """Return the sample standard deviation over the seeds of every rate and of their harmonic mean, in points.

    Rates of one seed are averaged over its concepts first. None where there is one seed alone, and where the seeds
    have not finished the same concepts, whose difficulty would look like spread.
    """
    keys = (*RATES, "mean")
    by_seed: dict[int, list[RowResult]] = {}
    for result in results:
        by_seed.setdefault(result["seed"], []).append(result)
    concepts = {tuple(sorted(result["concept"] for result in same)) for same in by_seed.values()}
    if len(by_seed) < 2 or len(concepts) > 1:
        return dict.fromkeys(keys)
    columns: dict[str, list[float]] = {key: [] for key in keys}
    for same in by_seed.values():
        rates = {key: mean(100 * result[name]["value"] for result in same) for key, name in RATES.items()}
        for key, rate in rates.items():
            columns[key].append(rate)
        columns["mean"].append(harmonic(rates.values()))
    return {key: stdev(column) for key, column in columns.items()}


def intervals(results: Sequence[RowResult]) -> dict[str, tuple[float, float]]:
    """Return Wilson's 95 % interval of every rate, in percent, over the pictures of all results together.

    A picture that gives several answers counts once, as in erase_sd.pocket.score.
    """
    found = {}
    for key, name in RATES.items():
        rate = mean(result[name]["value"] for result in results)
        low, high = wilson(rate, sum(min(result[name]["n"], result["n"]) for result in results))
        found[key] = (100 * low, 100 * high)
    return found


def average(results: Sequence[RowResult], name: str) -> float:
    """Return the mean of one entry of the results."""
    return mean(result[name] for result in results)


def distance_values(rows: list[BenchmarkRow], original: Finished, distances: Distances) -> Values:
    """Return FID, KID (x 1000), the samples a side, and FID less the original model's over the same seeds.

    The difference hardly depends on the number of samples, which biases both alike; their ratio does.
    """
    found = distances.of(rows)
    if found is None:
        return {"fid": None, "fid_above": None, "kid": None, "n": None}
    seeds = {row.seed for row in rows if row.key in found["rows"]}
    same_seeds = [row for row, _ in original if row.seed in seeds]
    noise = distances.of(same_seeds)
    above = None
    if noise and noise["n"] == found["n"]:
        above = found["fid"] - noise["fid"]
    return {"fid": found["fid"], "fid_above": above, "kid": 1000 * found["kid"], "n": found["n"]}


def overall(single: list[MethodScore], results: Sequence[RowResult]) -> MethodScore:
    """Return the mean over the concepts, known where it is known of all; the harmonic mean is that of these means.

    `results` are those of all of its rows, for spread and intervals.
    """
    first, *_ = single
    values: Values = {}
    for key in first.values:
        column = [s.values[key] for s in single]
        values[key] = None if None in column else mean(column)
    values["mean"] = harmonic([values["ua"], values["ira"], values["cra"]])
    runs = sum(s.runs for s in single)
    return MethodScore(first.method, None, runs, values, spread_of(results), intervals(results))


def harmonic(rates: Iterable[float]) -> float:
    """Return the harmonic mean of rates in percent, 0 if one of them is."""
    return harmonic_mean(list(rates))


def retention(score: MethodScore) -> float:
    """Return the mean of IRA and CRA, in percent."""
    return mean((score.values["ira"], score.values["cra"]))


def front(points: dict[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points on the Pareto front; higher is better in both coordinates.

    A point is on it if no other is equal in one coordinate and better in the other, or better in both.
    """
    best = set()
    for name, point in points.items():
        if not any(dominates(other, point) for other in points.values()):
            best.add(name)
    return best


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Return whether a is nowhere below b and not the same."""
    return a[0] >= b[0] and a[1] >= b[1] and a != b


def pareto(board: Iterable[MethodScore]) -> set[str]:
    """Return the methods on the front of erasure and retention; the original model erases nothing and is none."""
    points = {}
    for score in board:
        if score.method != ORIGINAL:
            points[score.method] = (score.values["ua"], retention(score))
    return front(points)


def pooled(x: Tensor, y: Tensor) -> dict[str, float]:
    """Return FID and KID (all images, one subset) of features (N, D) to as many others."""
    return {
        "fid": frechet(statistics(x), statistics(y)),
        "kid": kernel_distance(x, y, size=len(x)).item(),
        "n": len(x),
    }


class Distances:
    """Distances of pooled rows, computed while their features are there and kept in distances.json without them."""

    def __init__(self, folder: Path, published: dict[str, dict[str, Any]]) -> None:
        self.folder, self.file = folder, folder / "distances.json"
        self.known = dict(published)
        if self.file.is_file():
            self.known |= read_json(self.file, "remove it and run the same command again")

    def of(self, rows: list[BenchmarkRow]) -> dict[str, Any] | None:
        """Return FID and KID of all seeds' retain samples together to the original's from other seeds.

        Where features are gone, finished on another machine, that of the most rows that were compared before; None
        if there is none.
        """
        keys = sorted(row.key for row in rows)
        name = digest(keys)
        if name in self.known:
            return self.known[name]
        complete = bool(rows)
        for row in rows:
            complete = complete and features_file(row, self.folder).is_file()
        if not complete:
            return max(self._within(keys).values(), key=lambda entry: entry["n"], default=None)
        ours, theirs = [], []
        for row in rows:
            ours.append(load_file(features_file(row, self.folder))["features"])
            theirs.append(reference(row.concept, row.seed, row.pictures[1], self.folder))
        self.known[name] = pooled(torch.cat(ours), torch.cat(theirs)) | {"rows": keys}
        return self.known[name]

    def write(self, keys: Iterable[str]) -> None:
        """Keep what is of these rows."""
        write_atomic(self.file, json.dumps(self._within(keys), indent=1) + "\n")

    def _within(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return what is known of these rows and no others."""
        rows = set(keys)
        return {name: entry for name, entry in self.known.items() if rows.issuperset(entry["rows"])}
