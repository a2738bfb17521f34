"""What a run is about: the concept's prompts, how to look at it before and after, and who can judge it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image

import prompts
from erase_sd.common.errors import UserError, asked_by_the_user
from erase_sd.common.processes import pictures
from erase_sd.denoising.samples import Sources
from erase_sd.models.pipeline import sample
from erase_sd.pocket import prompt_sets as lessons
from erase_sd.pocket import score
from erase_sd.pocket import world as captions
from erase_sd.settings import Job

SHOWN = 6  # pictures of the concept, and as many of everything else, in before_after.png


class Preview(NamedTuple):
    """The same prompts and seeds, drawn at one moment of the run; answers only where there is a judge."""

    prompts: list[str]
    images: list[Image.Image]
    answers: list[captions.Answer] | None


@dataclass(frozen=True)
class Target:
    """A concept, or several, on a model that nobody can judge automatically."""

    names: tuple[str, ...]  # a concept file's name is its own, however the user spelled it
    sources: Sources
    shown: tuple[str, ...]
    steps: int = 30
    guidance: float = 7.5
    size: int | None = None  # pixels a side

    def look(self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str) -> Preview:
        """Draw the prompts that the picture shows, and answer the exam if there is one."""
        seeds = list(range(900_000, 900_000 + len(self.shown)))
        how = {"steps": self.steps, "guidance": self.guidance, "size": self.size}
        drawn = pictures(list(self.shown), seeds, 4, lambda texts, places: sample(pipe, texts, places, **how), when)
        images = [image for part in drawn for image in part]
        return Preview(list(self.shown), images, self._answers(pipe, model_hash, cache, when))

    def _answers(self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str) -> None:
        return None

    def scores(self, before: Preview, after: Preview) -> dict | None:
        """scores.json, or None without a judge."""
        return None

    @property
    def explicit(self) -> bool:
        """Whether pictures of the concept are pixelated wherever they are shown."""
        return "nudity" in self.names


@dataclass(frozen=True)
class PocketTarget(Target):
    """Concepts of the pocket world, judged by its oracle."""

    parts: tuple[captions.Part, ...] = ()
    questions: tuple[lessons.Question, ...] = ()

    def _answers(
        self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str
    ) -> list[captions.Answer]:
        return score.answers(pipe, list(self.questions), model_hash, cache, f"scores {when}")

    def scores(self, before: Preview, after: Preview) -> dict:
        """scores.json by the oracle."""
        return score.scores(list(self.parts), list(self.questions), before.answers, after.answers)


def resolve(job: Job, size: int | None = None) -> Target:
    """The subject of a job, on images of `size` pixels. Raises UserError for a concept the model has no words for."""
    if job.model == "pocket" and size:
        raise UserError(f"--resolution {size} is for other models: the pocket model draws 64 pixels")
    return _pocket(job) if job.model == "pocket" else _open(job, size)


def _pocket(job: Job) -> PocketTarget:
    parts = [captions.part_named(text, job.kind) for text in job.concept]
    if twice := [text for text, part in zip(job.concept, parts, strict=True) if parts.count(part) > 1]:
        raise UserError(f"--concept {' '.join(map(repr, twice))} names one concept twice: name each once")
    wanted = {part: _other(part, text, parts) for part, text in zip(parts, job.anchors(), strict=True) if text}
    forget, retain = lessons.forget_examples(parts, job.seed, wanted), lessons.retain_prompts(parts, job.seed)
    questions = lessons.exam(parts, job.eval_forget, job.eval_retain, job.seed)
    scenes = [q.scene for q in lessons.exam(parts, SHOWN, SHOWN)]
    return PocketTarget(
        names=job.concept,
        sources=Sources(forget, retain, ", ".join(captions.of_part(part) for part in parts)),
        shown=tuple(captions.caption(scene) for scene in scenes),
        steps=score.STEPS,
        guidance=score.GUIDANCE,
        parts=tuple(parts),
        questions=tuple(questions),
    )


def _other(part: captions.Part, anchor: str, erased: list[captions.Part]) -> str:
    """The word that an anchor names; UserError unless it is another one of the concept's kind that stays."""
    kind, word = part
    named = captions.part_named(anchor, kind)
    if named in erased:
        raise UserError(f"--anchor {anchor!r} is to be erased: give another {kind} instead of {word!r}")
    return named[1]


def _open(job: Job, size: int | None) -> Target:
    with asked_by_the_user():
        concepts = [
            prompts.load(text, job.kind, anchor) for text, anchor in zip(job.concept, job.anchors(), strict=True)
        ]
    for anchor, concept in product(job.anchor, concepts):
        if concept.names(anchor):
            raise UserError(f"--anchor {anchor!r} names {concept.name!r}, which is to be erased: give another caption")
    by_turns = zip_longest(*(concept.examples for concept in concepts))  # so that few pictures still show every one
    examples = [example for turn in by_turns for example in turn if example]
    harmless = [set(prompts.captions(without=concept)) for concept in concepts]
    kept = [line for line in prompts.captions() if all(line in lines for lines in harmless)]
    asked = [examples[i % len(examples)].prompt for i in range(4)]
    return Target(
        names=tuple(concept.name for concept in concepts),
        sources=Sources(examples, kept, ", ".join(concept.name for concept in concepts)),
        steps=job.picture_steps,
        shown=(*asked, *kept[:: max(1, len(kept) // 4)][:4]),
        size=size,
    )
