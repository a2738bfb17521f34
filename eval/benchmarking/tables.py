"""The benchmark's tables: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from erase_sd.common.cli import run_main as run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic
from erase_sd.common.signals import StopFlag as StopFlag
from erase_sd.pocket.score import wilson
from eval.benchmarking.aggregate import RATES, Finished, MethodScore, RowResult, common, pareto
from eval.benchmarking.rows import BenchmarkRow, protocol
from eval.benchmarking.suites import ORIGINAL, Suite

LEGEND = """UA: share of the concept's pictures that no longer show it; IRA: accuracy of its kind on the prompts
without it; CRA: accuracy of the other kinds on all prompts (UnlearnCanvas, arXiv:2402.11846), by the oracle, in
percent; HM: their harmonic mean. Nothing: share of the concept's pictures in which the oracle sees nothing of its
kind, in percent. FID and KID (x 1000) compare the retain pictures of all seeds together with as many of the original
model for the same prompts from other seeds, by the oracle's pooled features (--features pocket of eval.quality, not
InceptionV3); those of the original model are the noise floor, FID / floor is in units of that of the same seeds; KID
is below 0 where both sides draw the same prompts alike; n: pictures a side, fewer than all where rows came from
another machine without features. Drift: 1 - cosine (x 1000) to the original's picture of the same prompt and seed.
Seconds: the method alone on one thread, without drawing and judging; MiB: peak of its process. Front: no method erases
as well and retains ((IRA + CRA) / 2) better, or vice versa.
"""
COLUMNS: dict[str, tuple[str, int]] = {
    "ua": ("UA", 1),
    "ira": ("IRA", 1),
    "cra": ("CRA", 1),
    "mean": ("HM", 1),
    "other": ("nothing", 1),
    "fid": ("FID", 3),
    "floor": ("FID / floor", 2),
    "kid": ("KID", 2),
    "n": ("n", 0),
    "drift": ("drift", 1),
    "seconds": ("seconds", 1),
    "memory": ("MiB", 0),
    "broken": ("broken", 1),
}


def ranked(board: Sequence[MethodScore], concept: str | None) -> list[MethodScore]:
    """The standings of a concept, or of all together: the original model first, then the best harmonic mean."""
    mine = [s for s in board if s.concept == concept]
    return sorted(mine, key=lambda s: (s.method != ORIGINAL, -s.values["mean"]))


def as_csv(board: Sequence[MethodScore]) -> str:
    """One line per method and concept, and one ("all") for the mean over the concepts; what is not known is empty."""
    number = lambda x: "" if x is None else f"{x:.6g}"  # noqa: E731
    out = io.StringIO()
    heads = [*COLUMNS, "drift_rmse"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "concept", "runs", *heads, *(f"{key}_std" for key in RATES)])
    for s in board:
        cells = [number(s.values[key]) for key in heads] + [number(s.spread[key]) for key in RATES]
        writer.writerow([s.method, s.concept or "all", s.runs, *cells])
    return out.getvalue()


def markdown(name: str, suite: Suite, board: Sequence[MethodScore], left: Sequence[BenchmarkRow]) -> str:
    """The leaderboard, a table for every concept, and the rows that are `left` to be run."""
    concepts = list(dict.fromkeys(s.concept for s in board if s.concept))
    pictures = f"{suite.forget_pictures} pictures of the concept and {suite.retain_pictures} of everything else a run"
    page = [f"# Erasing methods: {name}\n\n{LEGEND}\n{pictures}; concepts: {', '.join(concepts)}.\n"]
    shared = common(board)
    title = "All concepts" if shared == concepts else f"Mean over {', '.join(shared)}, which every method has finished"
    page.append(f"\n## {title}\n\n{summary(board)}")
    for concept in concepts:
        page.append(f"\n## {concept}\n\nRates ± sample standard deviation over the seeds.\n\n")
        page.append(table(ranked(board, concept)))
    if left:
        page.append(f"\n## Not finished\n\n{_left(left)}")
    page.append(f"\nProtocol: {', '.join(f'{key} {value}' for key, value in protocol().items())}.\n")
    return "".join(page)


def summary(board: Sequence[MethodScore]) -> str:
    """The methods over all concepts, and which is the best."""
    return f"{table(ranked(board, None))}\n{verdict(board)}\n"


def _left(rows: Sequence[BenchmarkRow]) -> str:
    """One line a method."""
    methods = dict.fromkeys(row.method for row in rows)
    named = {m: ", ".join(f"{row.concept} {row.seed}" for row in rows if row.method == m) for m in methods}
    return "".join(f"- {method}: {text}\n" for method, text in named.items())


def table(board: Sequence[MethodScore]) -> str:
    """A Markdown table; columns of which nothing is known are left out."""
    best = pareto(board)
    columns: dict[str, Callable[[MethodScore], str]] = {"method": lambda s: s.method}
    for key, (head, digits) in COLUMNS.items():
        columns[head] = lambda s, key=key, digits=digits: cell(s, key, digits)
    columns |= {"runs": lambda s: str(s.runs), "front": lambda s: "yes" if s.method in best else ""}
    kept = {head: text for head, text in columns.items() if any(map(text, board))}
    if not any(s.values["broken"] for s in board):
        kept.pop("broken", None)
    lines = [f"| {' | '.join(kept)} |", "|---" * len(kept) + "|"]
    return "\n".join(lines + [f"| {' | '.join(text(s) for text in kept.values())} |" for s in board]) + "\n"


def cell(s: MethodScore, key: str, digits: int) -> str:
    """A value, with its deviation where there is one; nothing for what is not known."""
    value, spread = s.values[key], s.spread.get(key)
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def verdict(board: Sequence[MethodScore]) -> str:
    """Which method has the best harmonic mean, and how far it is from the original model."""
    methods = [s for s in ranked(board, None) if s.method != ORIGINAL]
    if not methods:
        return "No method has finished yet."
    best, first = methods[0], next((s for s in board if s.method == ORIGINAL and s.concept is None), None)
    text = f"Best harmonic mean: {best.method} ({best.values['mean']:.1f})"
    if first:
        apart = (best.values[key] - first.values[key] for key in ("ira", "cra"))
        text += "; IRA {:+.1f} and CRA {:+.1f} points from the original model".format(*apart)
    return f"{text}."


RESULT_HEADS = (
    "concept",
    "drawn when asked (100 - UA)",
    "nothing recognisable instead",
    "others of its kind (IRA)",
    "the other kinds (CRA)",
    "entries re-initialised",
    "minutes",
)


def results_table(finished: Finished, method: str) -> str:
    """One row per concept: before (the original model) and after in percent, over the seeds that both have finished.

    Intervals are Wilson's, over all their pictures: as in eval.pocket, one that gives several answers counts once.
    """
    pairs = paired(finished, method)
    if not pairs:
        return f"{method} has finished no row.\n"
    lines = [f"| {' | '.join(RESULT_HEADS)} |", "|---" * len(RESULT_HEADS) + "|"]
    lines += [f"| {' | '.join([concept, *results_cells(found)])} |" for concept, found in pairs.items()]
    results = [after for found in pairs.values() for _, after in found]
    seeds, most = sorted({r["seed"] for r in results}), max(map(len, pairs.values()))
    forget, retain = (most * results[0][name]["n"] for name in ("UA", "IRA"))
    asked = f"together {forget} pictures of the concept and {retain} of everything else per row"
    lines.append(
        f"\nBefore → after [95 % interval of after]; seeds {', '.join(map(str, seeds))}; {asked}. Minutes are the "
        "method's own, on one thread."
    )
    return "\n".join(lines) + "\n"


def paired(finished: Finished, method: str) -> dict[str, list[tuple[RowResult, RowResult]]]:
    """By concept, the original model's result and the method's with the same seed."""
    found = {(row.method, row.concept, row.seed): result for row, result in finished}
    pairs: dict[str, list[tuple[RowResult, RowResult]]] = {}
    for (name, concept, seed), after in found.items():
        if name == method and (before := found.get((ORIGINAL, concept, seed))):
            pairs.setdefault(concept, []).append((before, after))
    return pairs


def results_cells(found: Sequence[tuple[RowResult, RowResult]]) -> list[str]:
    """What a row says of its concept."""
    after = [result for _, result in found]
    return [
        results_cell(found, "UA", lost=True),
        f"{100 * mean(r['other_share'] for r in after):.1f}",
        results_cell(found, "IRA"),
        results_cell(found, "CRA"),
        f"{mean(r['reinitialised'] for r in after):,.0f}",
        f"{mean(r['seconds'] for r in after) / 60:.1f}",
    ]


def results_cell(found: Sequence[tuple[RowResult, RowResult]], name: str, lost: bool = False) -> str:
    """A rate before and after, or what is missing of it to 1."""
    before, after = (mean(r[name]["value"] for r in side) for side in zip(*found, strict=True))
    before, after = (1 - before, 1 - after) if lost else (before, after)
    low, high = wilson(after, sum(min(r[name]["n"], r["n"]) for _, r in found))  # answers, and pictures of the row
    return f"{100 * before:.1f} → {100 * after:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def around(readme: Path, name: str) -> tuple[str, str]:
    """What a page has up to its first mark of this name, and from its last; UserError if they are not there."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    page = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    head, _, rest = page.partition(start)
    _, last, tail = rest.partition(end)
    if not last:
        raise UserError(f"--readme {readme} has no line {start} followed by {end}")
    return head + start, last + tail


def replace_between(readme: Path, name: str, text: str) -> None:
    """Put the text between a page's marks of this name. Raises UserError as `around` does."""
    head, tail = around(readme, name)
    write_atomic(readme, f"{head}\n{text}{tail}")
