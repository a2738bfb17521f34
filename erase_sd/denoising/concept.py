"""What a run is about: the concept's prompts, its previews before and after, and who can judge them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

import prompts
from erase_sd.common.errors import UserError, asked_by_the_user
from erase_sd.common.processes import sample_shared
from erase_sd.denoising.samples import Sources
from erase_sd.models.pipeline import sample
from erase_sd.pocket import prompt_sets, score, world
from erase_sd.settings import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OPEN_SHOWN = 4  # the same on a model that can draw anything
SHOWN = 6  # images of the concept, and as many of everything else, in before_after.png


class Preview(NamedTuple):
    """The same prompts and seeds, sampled at one moment of the run; answers only where there is a judge."""

    prompts: list[str]
    images: list[Image.Image]
    answers: list[world.Answer] | None


@dataclass(frozen=True)
class Target:
    """A concept, or several, on a model that nobody can judge automatically."""

    names: tuple[str, ...]  # a concept file's name is its own, however the user spelled it
    sources: Sources
    shown: tuple[str, ...]
    steps: int = 30
    guidance: float = 7.5
    size: int | None = None  # pixels a side

    def preview(self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str) -> Preview:
        """Sample the prompts that before_after.png shows, and have a judge, if there is one, answer its questions."""

        def sample_batch(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            return sample(pipe, texts, seeds, steps=self.steps, guidance=self.guidance, size=self.size)

        shown = list(self.shown)
        seeds = list(range(900_000, 900_000 + len(shown)))
        images: list[Image.Image] = []
        for batch in sample_shared(shown, seeds, 4, sample_batch, when):
            images += batch
        return Preview(shown, images, self._answers(pipe, model_hash, cache, when))

    def _answers(self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str) -> None:
        return None

    def scores(self, before: Preview, after: Preview) -> dict | None:
        """Return the content of scores.json, or None without a judge."""
        return None

    @property
    def hidden(self) -> int:
        """Return how many of the shown prompts, the concept's own and first ones, are pixelated wherever they are."""
        return OPEN_SHOWN if "nudity" in self.names else 0


@dataclass(frozen=True)
class PocketTarget(Target):
    """Concepts of the pocket world, judged by its oracle."""

    parts: tuple[world.Part, ...] = ()
    questions: tuple[prompt_sets.Question, ...] = ()

    def _answers(
        self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str
    ) -> list[world.Answer] | None:
        if not self.questions:
            return None
        return score.answers(pipe, list(self.questions), model_hash, cache, f"scores {when}")

    def scores(self, before: Preview, after: Preview) -> dict | None:
        """Return the content of scores.json, by the oracle; None where it was asked nothing."""
        if not self.questions:
            return None
        return score.scores(list(self.parts), list(self.questions), before.answers, after.answers)


def resolve(job: Job, size: int | None = None) -> Target:
    """Return the target of a job, on images of `size` pixels a side.

    Raises UserError for a concept that the model has no words for, and for one that is named twice.
    """
    if job.model != "pocket":
        return _open(job, size)
    if size:
        raise UserError(f"--resolution {size} is for other models: the pocket model draws 32 pixels")
    return _pocket(job)


def _pocket(job: Job) -> PocketTarget:
    parts: list[world.Part] = []
    for text in job.concept:
        parts.append(world.part_named(text, job.kind))
    twice = [text for text, part in zip(job.concept, parts, strict=True) if parts.count(part) > 1]
    if twice:
        raise UserError(f"--concept {' '.join(map(repr, twice))} names one concept twice: name each once")
    wanted: dict[world.Part, str] = {}
    for part, anchor in zip(parts, job.anchors(), strict=True):
        if anchor:
            wanted[part] = _other(part, anchor, parts)
    shown = []
    for question in prompt_sets.exam(parts, SHOWN, SHOWN):
        shown.append(world.caption(question.scene))
    return PocketTarget(
        names=job.concept,
        sources=Sources(
            forget=prompt_sets.forget_examples(parts, job.seed, wanted),
            retain=prompt_sets.retain_prompts(parts, job.seed),
            concept=", ".join(map(world.of_part, parts)),
        ),
        shown=tuple(shown),
        steps=score.STEPS,
        guidance=score.GUIDANCE,
        parts=tuple(parts),
        questions=_questions(job, parts),
    )


def _questions(job: Job, parts: list[world.Part]) -> tuple[prompt_sets.Question, ...]:
    """Return what the oracle is asked; nothing for a job that is not to be scored."""
    if not job.score:
        return ()
    return tuple(prompt_sets.exam(parts, job.eval_forget, job.eval_retain, job.seed))


def _other(part: world.Part, anchor: str, erased: list[world.Part]) -> str:
    """Return the word that an anchor names; UserError unless it is another one of the concept's kind that stays."""
    kind, word = part
    named = world.part_named(anchor, kind)
    if named in erased:
        raise UserError(f"--anchor {anchor!r} is to be erased: give another {kind} instead of {word!r}")
    return named[1]


def _open(job: Job, size: int | None) -> Target:
    """Return the target of a job on a model that can draw anything."""
    concepts: list[prompts.Concept] = []
    with asked_by_the_user():
        for text, anchor in zip(job.concept, job.anchors(), strict=True):
            concepts.append(prompts.load(text, job.kind, anchor))
    for anchor in job.anchor:
        for concept in concepts:
            if concept.names(anchor):
                raise UserError(
                    f"--anchor {anchor!r} names {concept.name!r}, which is to be erased: give another caption"
                )
    examples: list[prompts.Example] = []
    for turn in zip_longest(*(concept.examples for concept in concepts)):  # so that few images still show every one
        examples += filter(None, turn)
    retain = prompts.captions()
    for concept in concepts:
        harmless = set(prompts.captions(without=concept))
        retain = [line for line in retain if line in harmless]
    shown = []
    for i in range(OPEN_SHOWN):
        shown.append(examples[i % len(examples)].prompt)
    shown += retain[:: max(1, len(retain) // 4)][:4]
    names = tuple(concept.name for concept in concepts)
    return Target(
        names=names,
        sources=Sources(examples, retain, ", ".join(names)),
        steps=job.picture_steps,
        shown=tuple(shown),
        size=size,
    )
