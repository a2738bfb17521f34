"""The benchmark's results of one method, concept by concept, with their confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from erase_sd.pocket.score import wilson
from eval.standings import Finished, Result
from eval.suite import ORIGINAL

HEADS = (
    "concept",
    "drawn when asked (100 - UA)",
    "nothing recognisable instead",
    "others of its kind (IRA)",
    "the other kinds (CRA)",
    "entries re-initialised",
    "minutes",
)


def markdown(finished: Finished, method: str) -> str:
    """One row per concept: before (the original model) and after in percent, over the seeds that both have finished.

    Intervals are Wilson's, over all their pictures: as in eval.pocket, one that gives several answers counts once.
    """
    pairs = paired(finished, method)
    if not pairs:
        return f"{method} has finished no row.\n"
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    lines += [f"| {' | '.join([concept, *cells(found)])} |" for concept, found in pairs.items()]
    results = [after for found in pairs.values() for _, after in found]
    seeds, most = sorted({r["seed"] for r in results}), max(map(len, pairs.values()))
    forget, retain = (most * results[0][name]["n"] for name in ("UA", "IRA"))
    asked = f"together {forget} pictures of the concept and {retain} of everything else per row"
    lines.append(
        f"\nBefore → after [95 % interval of after]; seeds {', '.join(map(str, seeds))}; {asked}. Minutes are the "
        "method's own, on one thread."
    )
    return "\n".join(lines) + "\n"


def paired(finished: Finished, method: str) -> dict[str, list[tuple[Result, Result]]]:
    """By concept, the original model's result and the method's with the same seed."""
    found = {(row.method, row.concept, row.seed): result for row, result in finished}
    pairs: dict[str, list[tuple[Result, Result]]] = {}
    for (name, concept, seed), after in found.items():
        if name == method and (before := found.get((ORIGINAL, concept, seed))):
            pairs.setdefault(concept, []).append((before, after))
    return pairs


def cells(found: Sequence[tuple[Result, Result]]) -> list[str]:
    """What a row says of its concept."""
    after = [result for _, result in found]
    return [
        cell(found, "UA", lost=True),
        f"{100 * mean(r['other_share'] for r in after):.1f}",
        cell(found, "IRA"),
        cell(found, "CRA"),
        f"{mean(r['reinitialised'] for r in after):,.0f}",
        f"{mean(r['seconds'] for r in after) / 60:.1f}",
    ]


def cell(found: Sequence[tuple[Result, Result]], name: str, lost: bool = False) -> str:
    """A rate before and after, or what is missing of it to 1."""
    before, after = (mean(r[name]["value"] for r in side) for side in zip(*found, strict=True))
    before, after = (1 - before, 1 - after) if lost else (before, after)
    low, high = wilson(after, sum(min(r[name]["n"], r["n"]) for _, r in found))  # answers, and pictures of the row
    return f"{100 * before:.1f} → {100 * after:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
