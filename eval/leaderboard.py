"""The benchmark's tables: CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from eval.standings import RATES, Standing, common, pareto
from eval.suite import ORIGINAL, Row, Suite, protocol

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


def ranked(board: Sequence[Standing], concept: str | None) -> list[Standing]:
    """The standings of a concept, or of all together: the original model first, then the best harmonic mean."""
    mine = [s for s in board if s.concept == concept]
    return sorted(mine, key=lambda s: (s.method != ORIGINAL, -s.values["mean"]))


def as_csv(board: Sequence[Standing]) -> str:
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


def markdown(name: str, suite: Suite, board: Sequence[Standing], left: Sequence[Row]) -> str:
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


def summary(board: Sequence[Standing]) -> str:
    """The methods over all concepts, and which is the best."""
    return f"{table(ranked(board, None))}\n{verdict(board)}\n"


def _left(rows: Sequence[Row]) -> str:
    """One line a method."""
    methods = dict.fromkeys(row.method for row in rows)
    named = {m: ", ".join(f"{row.concept} {row.seed}" for row in rows if row.method == m) for m in methods}
    return "".join(f"- {method}: {text}\n" for method, text in named.items())


def table(board: Sequence[Standing]) -> str:
    """A Markdown table; columns of which nothing is known are left out."""
    best = pareto(board)
    columns: dict[str, Callable[[Standing], str]] = {"method": lambda s: s.method}
    for key, (head, digits) in COLUMNS.items():
        columns[head] = lambda s, key=key, digits=digits: cell(s, key, digits)
    columns |= {"runs": lambda s: str(s.runs), "front": lambda s: "yes" if s.method in best else ""}
    kept = {head: text for head, text in columns.items() if any(map(text, board))}
    if not any(s.values["broken"] for s in board):
        kept.pop("broken", None)
    lines = [f"| {' | '.join(kept)} |", "|---" * len(kept) + "|"]
    return "\n".join(lines + [f"| {' | '.join(text(s) for text in kept.values())} |" for s in board]) + "\n"


def cell(s: Standing, key: str, digits: int) -> str:
    """A value, with its deviation where there is one; nothing for what is not known."""
    value, spread = s.values[key], s.spread.get(key)
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def verdict(board: Sequence[Standing]) -> str:
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
