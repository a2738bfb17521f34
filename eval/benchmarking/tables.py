"""The benchmark's tables as CSV and Markdown: the leaderboard of all methods, and one method before and after."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import mean

from erase_sd.pocket.oracle import Oracle
from erase_sd.pocket.score import wilson
from eval.benchmarking.aggregate import RATES, MethodScore, average, common, pareto
from eval.benchmarking.rows import BenchmarkRow, Finished, RowResult, protocol
from eval.benchmarking.suites import ORIGINAL, Suite

LEGEND = """UA: share of the concept's pictures that no longer show it; IRA: accuracy of its kind on the prompts
without it; CRA: accuracy of the other kinds on all prompts (UnlearnCanvas, arXiv:2402.11846), by the oracle, in
percent; HM: their harmonic mean; ±: sample standard deviation over trainings (seeds). Nothing: share of the concept's
pictures in which the oracle sees nothing of its kind, in percent. FD (Fréchet distance) and KD (kernel distance, x
1000) compare the retain pictures of all seeds together with as many of the original model for the same prompts from
other seeds, by the oracle's pooled features (--features pocket of eval.quality), not by InceptionV3 as FID and KID;
FD - floor is FD less that of the original model over the same seeds: FD itself falls with n and is comparable at one n
only; KD is below 0 where both sides draw the same prompts alike; n: pictures a side, fewer than all where rows came
from another machine without features. Drift: 1 - cosine (x 1000) to the original's picture of the same prompt and
seed. Seconds: the method alone on one thread, without drawing and judging; MiB: peak of its process. Front: no method
erases as well and retains ((IRA + CRA) / 2) better, or vice versa.
"""
COLUMNS: dict[str, tuple[str, int]] = {  # of a MethodScore's values: head in the page, digits
    "ua": ("UA", 1),
    "ira": ("IRA", 1),
    "cra": ("CRA", 1),
    "mean": ("HM", 1),
    "other": ("nothing", 1),
    "fid": ("FD", 3),
    "fid_above": ("FD - floor", 3),
    "kid": ("KD", 2),
    "n": ("n", 0),
    "drift": ("drift", 1),
    "seconds": ("seconds", 1),
    "memory": ("MiB", 0),
    "broken": ("broken", 1),
}
BEFORE_AFTER_HEADS = (
    "concept",
    "drawn when asked (100 - UA)",
    "nothing recognisable instead",
    "others of its kind (IRA)",
    "the other kinds (CRA)",
    "entries re-initialised",
    "minutes",
)
Pair = tuple[RowResult, RowResult]  # the original model's result and the method's with the same seed


def ranked(board: Sequence[MethodScore], concept: str | None) -> list[MethodScore]:
    """Return the scores of a concept, or of all together: the original model first, then the best harmonic mean."""
    scores = [s for s in board if s.concept == concept]
    return sorted(scores, key=lambda s: (s.method != ORIGINAL, -s.values["mean"]))


def leaderboard_csv(board: Sequence[MethodScore]) -> str:
    """Return one line per method and concept, and one ("all") for the mean over the concepts; unknown is empty.

    `_std` is over trainings, `_low` and `_high` are Wilson's interval over pictures.
    """
    out = io.StringIO()
    heads = [*COLUMNS, "drift_rmse"]
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{key}_{end}" for key in RATES for end in ("low", "high")]
    writer.writerow(["method", "concept", "runs", *heads, *(f"{key}_std" for key in (*RATES, "mean")), *ends])
    for s in board:
        cells = [_number(s.values[key]) for key in heads]
        cells += [_number(s.spread[key]) for key in (*RATES, "mean")]
        for key in RATES:
            cells += map(_number, s.interval[key])
        writer.writerow([s.method, s.concept or "all", s.runs, *cells])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def leaderboard_page(name: str, suite: Suite, board: Sequence[MethodScore], left: Sequence[BenchmarkRow]) -> str:
    """Return the leaderboard, a table for every concept, and the rows that are `left` to be run, in Markdown."""
    concepts = list(dict.fromkeys(s.concept for s in board if s.concept))
    pictures = f"{suite.forget_pictures} pictures of the concept and {suite.retain_pictures} of everything else a run"
    page = [f"# Erasing methods: {name}\n\n{LEGEND}\n{pictures}; concepts: {', '.join(concepts)}.\n"]
    shared = common(board)
    title = "All concepts" if shared == concepts else f"Mean over {', '.join(shared)}, which every method has finished"
    page.append(f"\n## {title}\n\n{leaderboard_summary(board)}{few_pictures(board)}")
    for concept in concepts:
        page.append(f"\n## {concept}\n\n")
        page.append(leaderboard_table(ranked(board, concept)))
    if left:
        page.append(f"\n## Not finished\n\n{_left(left)}")
    terms = ", ".join(f"{key} {value}" for key, value in protocol().items())
    page.append(f"\nProtocol: {terms}.\n")
    return "".join(page)


def leaderboard_summary(board: Sequence[MethodScore]) -> str:
    """Return the methods over all concepts, and which is the best."""
    return f"{leaderboard_table(ranked(board, None))}\n{verdict(board)}\n"


def few_pictures(board: Sequence[MethodScore]) -> str:
    """Return a caution where distances are of no more pictures than their features have dimensions, or nothing."""
    dimensions = Oracle().heads["object"].in_features
    counts = [s.values["n"] for s in board if s.values.get("n")]
    if not counts or min(counts) > dimensions:
        return ""
    text = f"Caution: {min(counts):.0f} pictures a side span fewer than the {dimensions} dimensions of the features"
    return f"\n{text}: the bias of FD is large, and FD - floor is rough.\n"


def _left(rows: Sequence[BenchmarkRow]) -> str:
    """Return one line a method, with the concepts and seeds of its rows."""
    named: dict[str, list[str]] = {}
    for row in rows:
        named.setdefault(row.method, []).append(f"{row.concept} {row.seed}")
    lines = ""
    for method, texts in named.items():
        lines += f"- {method}: {', '.join(texts)}\n"
    return lines


def leaderboard_table(board: Sequence[MethodScore]) -> str:
    """Return a Markdown table; columns of which nothing is known are left out, and "broken" where nothing is."""
    best = pareto(board)
    columns: dict[str, list[str]] = {}
    broken = 0
    for s in board:
        columns.setdefault("method", []).append(s.method)
        for key, (head, digits) in COLUMNS.items():
            columns.setdefault(head, []).append(score_cell(s, key, digits))
        columns.setdefault("runs", []).append(str(s.runs))
        columns.setdefault("front", []).append("yes" if s.method in best else "")
        broken += s.values["broken"]
    if not broken:
        columns.pop("broken", None)
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    lines = [f"| {' | '.join(kept)} |", "|---" * len(kept) + "|"]
    for cells in zip(*kept.values(), strict=True):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score_cell(s: MethodScore, key: str, digits: int) -> str:
    """Return a value, with its deviation where there is one; nothing for what is not known."""
    value, spread = s.values[key], s.spread.get(key)
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    if spread is not None:
        text += f" ± {spread:.{digits}f}"
    return text


def verdict(board: Sequence[MethodScore]) -> str:
    """Return which method has the best harmonic mean, and how far it is from the original model."""
    original = None
    methods = []
    for s in ranked(board, None):
        if s.method == ORIGINAL:
            original = s
        else:
            methods.append(s)
    if not methods:
        return "No method has finished yet."
    best = methods[0]
    text = f"Best harmonic mean: {best.method} ({score_cell(best, 'mean', 1)})"
    if close := _not_told_apart(best, methods[1:]):
        text += f", which these seeds do not tell apart from {', '.join(close)}"
    if original:
        ira = best.values["ira"] - original.values["ira"]
        cra = best.values["cra"] - original.values["cra"]
        text += f"; IRA {ira:+.1f} and CRA {cra:+.1f} points from the original model"
    return f"{text}."


def _not_told_apart(best: MethodScore, others: Sequence[MethodScore]) -> list[str]:
    """Return the methods whose harmonic mean is below the best by less than both deviations together."""
    names = []
    for s in others:
        apart = best.values["mean"] - s.values["mean"]
        if apart <= (best.spread["mean"] or 0) + (s.spread["mean"] or 0):
            names.append(s.method)
    return names


def before_after_table(finished: Finished, method: str) -> str:
    """Return one row per concept: the original model and the method in percent, over the seeds that both finished.

    Intervals are Wilson's, over all their samples: as in erase_sd.pocket.score, one that gives several answers counts
    once.
    """
    pairs = paired(finished, method)
    if not pairs:
        return f"{method} has finished no row.\n"
    lines = [f"| {' | '.join(BEFORE_AFTER_HEADS)} |", "|---" * len(BEFORE_AFTER_HEADS) + "|"]
    seeds: set[int] = set()
    most = 0
    for concept, found in pairs.items():
        lines.append(f"| {' | '.join([concept, *before_after_cells(found)])} |")
        for _, after in found:
            seeds.add(after["seed"])
        most = max(most, len(found))
    _, first = next(iter(pairs.values()))[0]
    pictures = f"together {most * first['UA']['n']} pictures of the concept and {most * first['IRA']['n']} of "
    pictures += "everything else per row"
    lines.append(
        "\nBefore → after [95 % interval of after, over pictures]; lowest to highest of the trainings, seeds "
        f"{', '.join(map(str, sorted(seeds)))}; {pictures}. Minutes are the method's own, on one thread."
    )
    return "\n".join(lines) + "\n"


def paired(finished: Finished, method: str) -> dict[str, list[Pair]]:
    """Return, by concept, the original model's result and the method's with the same seed."""
    originals = {(row.concept, row.seed): result for row, result in finished if row.method == ORIGINAL}
    pairs: dict[str, list[Pair]] = {}
    for row, after in finished:
        before = originals.get((row.concept, row.seed))
        if row.method == method and before:
            pairs.setdefault(row.concept, []).append((before, after))
    return pairs


def before_after_cells(found: Sequence[Pair]) -> list[str]:
    """Return the cells of a concept's row, but for its name."""
    after = [result for _, result in found]
    others = average(after, "other_share")
    entries = average(after, "reinitialised")
    seconds = average(after, "seconds")
    return [
        before_after_rate(found, "UA", missing=True),
        f"{100 * others:.1f}",
        before_after_rate(found, "IRA"),
        before_after_rate(found, "CRA"),
        f"{entries:,.0f}",
        f"{seconds / 60:.1f}",
    ]


def before_after_rate(found: Sequence[Pair], name: str, missing: bool = False) -> str:
    """Return a rate before and after with its interval, or what is `missing` of it to 1; in percent."""
    rates_before, rates_after = [], []
    samples = 0
    for original, result in found:
        rates_before.append(original[name]["value"])
        rates_after.append(result[name]["value"])
        samples += min(result[name]["n"], result["n"])  # answers, and samples of the row
    before, after = mean(rates_before), mean(rates_after)
    if missing:
        before, after = 1 - before, 1 - after
    low, high = wilson(after, samples)
    text = f"{100 * before:.1f} → {100 * after:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if len(rates_after) < 2:
        return text
    trainings = [100 * (1 - rate if missing else rate) for rate in rates_after]
    return f"{text}; {min(trainings):.1f} to {max(trainings):.1f}"
