"""Scores of the pocket model by the oracle: is the concept gone, is the rest there, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

from erase_sd.common.files import digest, file_digest, write_atomic
from erase_sd.common.processes import pictures, shared
from erase_sd.models.pipeline import sample
from erase_sd.pocket.oracle import OTHER, WEIGHTS, load, name
from erase_sd.pocket.prompt_sets import Question
from erase_sd.pocket.world import KINDS, Answer, Part, caption

STEPS, GUIDANCE = 20, 3.5  # the pocket model's own sampling


def answers(
    pipe: StableDiffusionPipeline, questions: list[Question], model_hash: str, cache: Path | None, description: str
) -> list[Answer]:
    """Draw every question and have the oracle name the pictures; with a cache, each question of a model only once."""
    key = digest([model_hash, file_digest(WEIGHTS), STEPS, GUIDANCE])
    path = cache and cache / f"answers-{key[:32]}.json"
    read = lambda path: json.loads(path.read_text()) if path and path.is_file() else {}  # noqa: E731
    known = next(shared([path], read))  # all processes miss the same answers, whoever writes in the meantime
    missing = [q for q in questions if _id(q) not in known]
    work = lambda texts, seeds: sample(pipe, texts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=64)  # noqa: E731
    drawn = pictures([caption(q.scene) for q in missing], [q.seed for q in missing], 64, work, description)
    images = [image for part in drawn for image in part]
    known |= dict(zip(map(_id, missing), name(load(), images) if images else [], strict=True))
    if path and missing:
        write_atomic(path, json.dumps(known))
    return [known[_id(q)] for q in questions]


def _id(question: Question) -> str:
    return f"{question.seed} {caption(question.scene)}"


def scores(parts: list[Part], questions: list[Question], before: list[Answer], after: list[Answer]) -> dict:
    """scores.json: rates in [0, 1] with 95 % Wilson intervals.

    concept: share of its pictures that show it, and of those after that show nothing of its kind at all (other_share);
    retain: accuracy per kind on prompts without it; spared: accuracy of the kinds not erased on the concept's prompts.
    """
    marked = list(zip(questions, before, after, strict=True))
    asked, kept = [m for m in marked if m[0].concept], [m for m in marked if not m[0].concept]
    erased = {kind for kind, _ in parts}
    concept = _both([(q.concept, b, a) for q, b, a in asked])
    ruined = sum(a[q.concept[0]] == OTHER for q, _, a in asked) / max(1, len(asked))
    retain = {kind: _accuracy(kept, kind) for kind in KINDS}
    spared = {kind: _accuracy(asked, kind) for kind in KINDS if kind not in erased}
    return {
        "concept": concept | {"other_share": ruined},
        "retain": retain,
        "spared": spared,
        "n": {"forget": len(asked), "retain": len(kept)},
        "ci95": {
            "concept": _intervals(concept, len(asked)),
            "retain": {kind: _intervals(both, len(kept)) for kind, both in retain.items()},
            "spared": {kind: _intervals(both, len(asked)) for kind, both in spared.items()},
        },
        "protocol": {
            "judge": "erase_sd/pocket/oracle.safetensors",
            "judge_sha256": file_digest(WEIGHTS),
            "unit": "share of images",
            "steps": STEPS,
            "guidance": GUIDANCE,
            "scheduler": "DDIM",
            "concepts": [list(part) for part in parts],
            "seeds": "one per image, below one million: never used in training",
        },
    }


def _both(rows: list[tuple[Part, Answer, Answer]]) -> dict[str, float]:
    """Share of pictures in which the oracle sees the wanted part, before and after."""
    n = max(1, len(rows))
    return {
        "before": sum(b[kind] == word for (kind, word), b, _ in rows) / n,
        "after": sum(a[kind] == word for (kind, word), _, a in rows) / n,
    }


def _accuracy(marked: list[tuple[Question, Answer, Answer]], kind: str) -> dict[str, float]:
    return _both([((kind, getattr(q.scene, kind)), b, a) for q, b, a in marked])


def _intervals(both: dict[str, float], n: int) -> dict[str, Sequence[float]]:
    return {when: wilson(rate, n) for when, rate in both.items()}


def wilson(rate: float, n: int, z: float = 1.96) -> Sequence[float]:
    """95 % interval of a rate over n images (Wilson 1927): honest at 0 and 1, where the normal interval is empty."""
    if n == 0:
        return [0.0, 1.0]
    centre, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round(max(0.0, x / (1 + z * z / n)), 4) for x in (centre - spread, min(centre + spread, 1 + z * z / n))]
