"""Scores of the pocket model by the oracle: is the concept gone, is the rest there, before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from erase_sd.common.files import digest, file_digest, write_atomic
from erase_sd.common.processes import sample_shared, shared
from erase_sd.models.pipeline import sample
from erase_sd.pocket.oracle import OTHER, WEIGHTS, load, name
from erase_sd.pocket.prompt_sets import Question
from erase_sd.pocket.world import KINDS, Answer, Part, caption

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

STEPS, GUIDANCE = 20, 3.5  # the pocket model's own sampling


class Marked(NamedTuple):
    """A question with the oracle's answers by the original model's image and by the erased model's."""

    question: Question
    before: Answer
    after: Answer


def answers(
    pipe: StableDiffusionPipeline, questions: list[Question], model_hash: str, cache: Path | None, description: str
) -> list[Answer]:
    """Sample an image for every question and return the oracle's names of it.

    With a cache, each question of a model is answered only once.
    """

    def sample_batch(texts: list[str], seeds: list[int]) -> list[Image.Image]:
        return sample(pipe, texts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=64)

    key = digest([model_hash, file_digest(WEIGHTS), STEPS, GUIDANCE])
    path = cache and cache / f"answers-{key[:32]}.json"
    known: dict[str, Answer] = next(shared([path], _stored))  # alike for all, whoever writes in the meantime
    missing = [question for question in questions if _id(question) not in known]
    texts = [caption(question.scene) for question in missing]
    seeds = [question.seed for question in missing]
    images: list[Image.Image] = []
    for batch in sample_shared(texts, seeds, 64, sample_batch, description):
        images += batch
    if images:
        known |= zip(map(_id, missing), name(load(), images), strict=True)
    if path and missing:
        write_atomic(path, json.dumps(known))
    return [known[_id(question)] for question in questions]


def _stored(path: Path | None) -> dict[str, Answer]:
    """Return the answers that a file holds, by question; none without the file."""
    return json.loads(path.read_text()) if path and path.is_file() else {}


def _id(question: Question) -> str:
    return f"{question.seed} {caption(question.scene)}"


def scores(parts: list[Part], questions: list[Question], before: list[Answer], after: list[Answer]) -> dict:
    """Return the content of scores.json: rates in [0, 1] with 95 % Wilson intervals.

    concept: share of its images that show it, and of those after that show nothing of its kind at all (other_share),
    over all concepts, and in `concepts` the same for each one where there are several, so that none hides another;
    retain: accuracy per kind on prompts without it; spared: accuracy of the kinds not erased on the concept's prompts.
    What no question asks about is left out.
    """
    asked: list[Marked] = []
    kept: list[Marked] = []
    for question, b, a in zip(questions, before, after, strict=True):
        if question.concept:
            asked.append(Marked(question, b, a))
        else:
            kept.append(Marked(question, b, a))
    rates: dict[str, dict] = {}
    intervals: dict[str, dict] = {}
    if asked:
        concept = _shown(asked, [question.concept for question, *_ in asked])
        rates["concept"] = concept | {"other_share": _share_of_others(asked)}
        intervals["concept"] = _intervals(concept, len(asked))
        if len(parts) > 1:
            rates["concepts"], intervals["concepts"] = _each(parts, asked)
    if kept:
        rates["retain"] = {kind: _accuracy(kept, kind) for kind in KINDS}
        intervals["retain"] = _intervals_by_kind(rates["retain"], len(kept))
    if asked:
        erased = {kind for kind, _ in parts}
        rates["spared"] = {kind: _accuracy(asked, kind) for kind in KINDS if kind not in erased}
        intervals["spared"] = _intervals_by_kind(rates["spared"], len(asked))
    return {
        **rates,
        "n": {"forget": len(asked), "retain": len(kept)},
        "ci95": intervals,
        "protocol": {
            "judge": "erase_sd/pocket/oracle.safetensors",
            "judge_sha256": file_digest(WEIGHTS),
            "unit": "share of images",
            "steps": STEPS,
            "guidance": GUIDANCE,
            "scheduler": "DDIM",
            "concepts": list(map(list, parts)),
            "seeds": "one per image, below one million: never used in training",
        },
    }


def _each(parts: list[Part], asked: list[Marked]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return the rates of each concept that was asked for, with its number of images, and their intervals."""
    rates: dict[str, dict] = {}
    intervals: dict[str, dict] = {}
    for part in parts:
        own = [marked for marked in asked if marked.question.concept == part]
        if own:
            shown = _shown(own, [part] * len(own))
            name = part[1] if part[0] == "object" else f"{part[1]} {part[0]}"
            rates[name] = shown | {"other_share": _share_of_others(own), "n": len(own)}
            intervals[name] = _intervals(shown, len(own))
    return rates, intervals


def _share_of_others(asked: list[Marked]) -> float:
    """Return the share of the concept's images that show nothing of its kind after the run."""
    others = 0
    for question, _, answer in asked:
        others += answer[question.concept[0]] == OTHER
    return others / len(asked)


def _accuracy(marked: list[Marked], kind: str) -> dict[str, float]:
    """Return the share of images that show the part of this kind for which their prompt asks."""
    return _shown(marked, [(kind, getattr(question.scene, kind)) for question, *_ in marked])


def _shown(marked: list[Marked], wanted: list[Part]) -> dict[str, float]:
    """Return the share of images in which the oracle sees the wanted part, before and after."""
    n, before, after = max(1, len(marked)), 0, 0
    for one, (kind, word) in zip(marked, wanted, strict=True):
        before += one.before[kind] == word
        after += one.after[kind] == word
    return {"before": before / n, "after": after / n}


def _intervals_by_kind(rates: dict[str, dict[str, float]], n: int) -> dict[str, dict[str, Sequence[float]]]:
    intervals = {}
    for kind, both in rates.items():
        intervals[kind] = _intervals(both, n)
    return intervals


def _intervals(both: dict[str, float], n: int) -> dict[str, Sequence[float]]:
    return {"before": wilson(both["before"], n), "after": wilson(both["after"], n)}


def wilson(rate: float, n: int, z: float = 1.96) -> Sequence[float]:
    """Return the 95 % interval of a rate over n images (Wilson 1927).

    It is honest at 0 and 1, where the normal interval is empty.
    """
    if n == 0:
        return [0.0, 1.0]
    scale = 1 + z * z / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [round(max(0.0, (centre - spread) / scale), 4), round(max(0.0, min(centre + spread, scale) / scale), 4)]
