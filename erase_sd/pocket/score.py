"""Scores of the pocket model by the oracle: is the concept gone, is the rest there, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from diffusers import StableDiffusionPipeline

from erase_sd.pipeline import sample
from erase_sd.pocket.captions import KINDS, caption
from erase_sd.pocket.lessons import Part, Question
from erase_sd.pocket.oracle import OTHER, WEIGHTS, load, name
from erase_sd.runtime import digest, file_digest, write_atomic

STEPS, GUIDANCE = 20, 5.0  # the pocket model's own sampling
Answer = dict[str, str]  # what the oracle sees: {"object": "cat", "style": "pencil", "background": "other"}


def answers(
    pipe: StableDiffusionPipeline, questions: list[Question], model_hash: str, cache: Path | None, description: str
) -> list[Answer]:
    """Draw every question and have the oracle name the pictures; cached by the hash of model, oracle and questions."""
    key = digest([model_hash, file_digest(WEIGHTS), [(caption(q.scene), q.seed) for q in questions], STEPS, GUIDANCE])
    path = cache and cache / f"answers-{key[:32]}.json"
    if path and path.is_file():
        return json.loads(path.read_text())
    images = sample(
        pipe,
        [caption(q.scene) for q in questions],
        [q.seed for q in questions],
        steps=STEPS,
        guidance=GUIDANCE,
        batch_size=64,
        description=description,
    )
    found = name(load(), images)
    if path:
        write_atomic(path, json.dumps(found))
    return found


def scores(parts: list[Part], questions: list[Question], before: list[Answer], after: list[Answer]) -> dict:
    """scores.json: rates in [0, 1] with 95 % Wilson intervals.

    concept: share of its pictures that show it, and of those after that show nothing of its kind at all (other_share);
    retain: accuracy per kind on prompts without it; spared: accuracy of the kinds not erased on the concept's prompts.
    """
    asked = [i for i, q in enumerate(questions) if q.concept]
    kept = [i for i, q in enumerate(questions) if not q.concept]

    def both(rows: list[int], right: dict[int, tuple[str, str]]) -> dict[str, float]:
        return {
            when: sum(seen[i][right[i][0]] == right[i][1] for i in rows) / max(1, len(rows))
            for when, seen in (("before", before), ("after", after))
        }

    def accuracy(rows: list[int], kind: str) -> dict[str, float]:
        return both(rows, {i: (kind, getattr(questions[i].scene, kind)) for i in rows})

    erased = {kind for kind, _ in parts}
    concept = both(asked, {i: questions[i].concept for i in asked})
    ruined = [after[i][questions[i].concept[0]] == OTHER for i in asked]
    retain = {kind: accuracy(kept, kind) for kind in KINDS}
    spared = {kind: accuracy(asked, kind) for kind in KINDS if kind not in erased}
    return {
        "concept": concept | {"other_share": sum(ruined) / max(1, len(asked))},
        "retain": retain,
        "spared": spared,
        "n": {"forget": len(asked), "retain": len(kept)},
        "ci95": {
            "concept": {when: wilson(rate, len(asked)) for when, rate in concept.items()},
            "retain": {
                k: {when: wilson(rate, len(kept)) for when, rate in both.items()} for k, both in retain.items()
            },
            "spared": {k: {when: wilson(rate, len(asked)) for when, rate in v.items()} for k, v in spared.items()},
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


def wilson(rate: float, n: int, z: float = 1.96) -> Sequence[float]:
    """95 % interval of a rate over n images (Wilson 1927): honest at 0 and 1, where the normal interval is empty."""
    if n == 0:
        return [0.0, 1.0]
    centre, spread = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round(max(0.0, x / (1 + z * z / n)), 4) for x in (centre - spread, min(centre + spread, 1 + z * z / n))]
