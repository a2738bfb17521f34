"""What a run is about: how its concepts are understood, its previews before and after, and who can judge them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

import prompts
from erase_sd.common.errors import UserError, asked_by_the_user
from erase_sd.common.processes import sample_shared
from erase_sd.denoising import own_data
from erase_sd.denoising.samples import Sources
from erase_sd.models.families import family, network, sampling_defaults
from erase_sd.models.pipeline import sample
from erase_sd.pocket import prompt_sets, score, world
from erase_sd.settings import Job
from prompts.english import mentions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OPEN_SHOWN = 4  # the same on a model that can draw anything
SHOWN = (
    6  # images of the concept, and as many of everything else, in before_after.png; of several concepts, of each one
)


class Preview(NamedTuple):
    """The same prompts and seeds, sampled at one moment of the run; answers only where there is a judge."""

    prompts: list[str]
    images: list[Image.Image]
    answers: list[world.Answer] | None


class Understanding(NamedTuple):
    """How one concept was understood: told before anything is drawn, and kept in run.json."""

    concept: str  # as it was asked for
    name: str
    kind: str
    words: tuple[str, ...]
    prompts: int  # that ask for it, or pictures of the user
    prompt: str  # one of them
    anchor: str  # what the model may draw instead of that one
    file: str | None = None  # the concept file that it was found in
    own: bool = False  # the pictures are the user's

    def __str__(self) -> str:
        """Return the sentence that tells it."""
        place = f", from {self.file}" if self.file else ""
        called = f" as {self.name!r}" if self.name != self.concept else ""
        many = f"{self.prompts} {'pictures of yours with captions' if self.own else 'prompts'}"
        return (
            f"{self.concept!r} is understood{called}, kind {self.kind}{place}: {many} such as "
            f"{self.prompt!r}, with the anchor {self.anchor!r}"
        )


@dataclass(frozen=True)
class Target:
    """A concept, or several, on a model that nobody can judge automatically."""

    names: tuple[str, ...]  # a concept file's name is its own, however the user spelled it
    sources: Sources
    shown: tuple[str, ...]
    understood: tuple[Understanding, ...] = ()
    hidden: tuple[bool, ...] = ()  # which of the shown prompts' images are pixelated wherever they are
    steps: int | None = None  # None leaves it to the model's family
    guidance: float | None = None
    size: int | None = None  # pixels a side

    def preview(self, pipe: DiffusionPipeline, model_hash: str, cache: Path | None, when: str) -> Preview:
        """Sample the prompts that before_after.png shows, and have a judge, if there is one, answer its questions."""

        usual = sampling_defaults(family(pipe), network(pipe))
        steps = self.steps or usual.shown_steps
        guidance = usual.guidance if self.guidance is None else self.guidance

        def sample_batch(texts: list[str], seeds: list[int]) -> list[Image.Image]:
            return sample(pipe, texts, seeds, steps=steps, guidance=guidance, size=self.size)

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

    def record(self) -> list[dict[str, Any]]:
        """Return how the concepts were understood, as JSON holds it."""
        found = []
        for one in self.understood:
            found.append(one._asdict() | {"words": list(one.words)})
        return found


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

    Raises UserError for a concept that the model has no words for, for one that is named twice, and for data of the
    user that cannot be used.
    """
    if job.forget_data and len(job.concept) > 1:
        raise UserError(f"--forget_data {job.forget_data} is of one concept: give one --concept, and one run for each")
    if job.model != "pocket":
        return _open(job, size)
    if size:
        raise UserError(f"--resolution {size} is for other models: the pocket model draws 32 pixels")
    return _pocket(job)


def _pocket(job: Job) -> PocketTarget:
    parts: list[world.Part] = []
    for text in job.concept:
        with asked_by_the_user():
            prompts.check_single(text)
        parts.append(world.part_named(text, job.kind))
    twice = [text for text, part in zip(job.concept, parts, strict=True) if parts.count(part) > 1]
    if twice:
        raise UserError(f"--concept {' '.join(map(repr, twice))} names one concept twice: name each once")
    wanted: dict[world.Part, str] = {}
    for part, anchor in zip(parts, job.anchors(), strict=True):
        if anchor:
            wanted[part] = _other(part, anchor, parts)
    shown = []
    for question in prompt_sets.exam(parts, max(SHOWN, len(parts)), SHOWN):
        shown.append(world.caption(question.scene))
    examples = prompt_sets.forget_examples(parts, job.seed, wanted)
    sources = Sources(
        forget=examples,
        retain=prompt_sets.retain_prompts(parts, job.seed),
        concepts=tuple(map(world.of_part, parts)),
        owners=tuple(prompt_sets.owners(examples, parts)),
    )
    sources = _with_own_data(sources, job, [(word,) for _, word in parts])
    understood = []
    for i, (text, (kind, word)) in enumerate(zip(job.concept, parts, strict=True)):
        understood.append(_understood(sources, i, text, name=text, kind=kind, words=(word,)))
    return PocketTarget(
        names=job.concept,
        sources=sources,
        shown=tuple(shown),
        understood=tuple(understood),
        hidden=(False,) * len(shown),
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
    concepts = _concepts(job)
    examples: list[prompts.Example] = []
    owners: list[int] = []
    for turn in range(max(len(concept.examples) for concept in concepts)):
        for i, concept in enumerate(concepts):  # in turns, each as often: few images still show every one
            examples.append(concept.examples[turn % len(concept.examples)])
            owners.append(i)
    names = tuple(concept.name for concept in concepts)
    sources = Sources(examples, prompts.captions(*concepts), concepts=names, owners=tuple(owners))
    sources = _with_own_data(sources, job, [(*concept.words, *concept.aliases) for concept in concepts])
    shown, hidden = _shown(sources, concepts)
    understood = []
    for i, (text, concept) in enumerate(zip(job.concept, concepts, strict=True)):
        facts = {"name": concept.name, "kind": concept.kind, "words": concept.words, "file": concept.file}
        understood.append(_understood(sources, i, text, **facts))
    return Target(
        names=names,
        sources=sources,
        understood=tuple(understood),
        steps=job.picture_steps,
        shown=shown,
        hidden=hidden,
        size=size,
    )


def _concepts(job: Job) -> list[prompts.Concept]:
    """Return the concepts of a job. Raises UserError for one that is named twice, and for an anchor that names one."""
    concepts: list[prompts.Concept] = []
    with asked_by_the_user():
        for text, anchor in zip(job.concept, job.anchors(), strict=True):
            concepts.append(prompts.load(text, job.kind, anchor))
    names = [concept.name.casefold() for concept in concepts]
    twice = [text for text, name in zip(job.concept, names, strict=True) if names.count(name) > 1]
    if twice:
        raise UserError(f"--concept {' '.join(map(repr, twice))} names one concept twice: name each once")
    for anchor in job.anchor:
        for concept in concepts:
            if concept.names(anchor):
                raise UserError(
                    f"--anchor {anchor!r} names {concept.name!r}, which is to be erased: give another caption"
                )
    return concepts


def _shown(sources: Sources, concepts: list[prompts.Concept]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Return the prompts of before_after.png, and which of their images are to be hidden.

    First the concepts' own, in turns and of each concept, then others: of a concept with neighbours to keep, half are
    these.
    """
    shown: list[str] = []
    hidden: list[bool] = []
    for i in range(max(OPEN_SHOWN, len(concepts))):
        i %= len(sources.forget)
        shown.append(sources.forget[i].prompt)
        hidden.append(concepts[sources.owners[i]].sensitive or prompts.sensitive(shown[-1]))
    near: set[str] = set()
    for concept in concepts:
        near.update(concept.retain)
    kept = _spread([line for line in sources.retain if line in near], OPEN_SHOWN // 2)
    kept += _spread([line for line in sources.retain if line not in near], OPEN_SHOWN - len(kept))
    return (*shown, *kept), (*hidden, *map(prompts.sensitive, kept))


def _spread(lines: list[str], most: int) -> list[str]:
    """Return some of the lines, evenly spread."""
    return lines[:: max(1, len(lines) // most)][:most]


def _understood(sources: Sources, i: int, text: str, **facts: Any) -> Understanding:
    """Return how the i-th concept was understood, by the examples that the run has for it."""
    own = [example for n, example in enumerate(sources.forget) if sources.owners[n] == i]
    example = own[len(own) // 2]  # the first ones are the shortest
    yours = bool(sources.forget_pictures)
    many = len(own) if yours else len({one.prompt for one in own})
    return Understanding(concept=text, prompts=many, prompt=example.prompt, anchor=example.anchor, own=yours, **facts)


def _with_own_data(sources: Sources, job: Job, words: list[tuple[str, ...]]) -> Sources:
    """Return the sources with the user's pictures and prompts in their places. Raises UserError for what is unusable.

    `words` name the concepts: what the user wants kept may not mention them.
    """
    if job.forget_data:
        sources = _with_own_pictures(sources, job.forget_data)
    if job.retain_prompts:
        lines = own_data.lines(job.retain_prompts, "--retain_prompts")
        kept = [line for line in lines if not _names_any(line, words)]
        return sources._replace(retain=_some(kept, f"--retain_prompts {job.retain_prompts}"))
    if job.retain_data:
        found = own_data.pictures(job.retain_data, "--retain_data")
        kept, paths = [], []
        for text, picture in zip(own_data.captions_of(found, "--retain_data"), found, strict=True):
            if not _names_any(text, words):
                kept.append(text)
                paths.append(picture.path)
        return sources._replace(retain=_some(kept, f"--retain_data {job.retain_data}"), retain_pictures=tuple(paths))
    return sources


def _with_own_pictures(sources: Sources, folder: str) -> Sources:
    """Return the sources with pictures of the user for the concept; what has no caption takes the concept's prompts.

    Captions of the user have the anchor that metadata.jsonl says, else that of a prompt of the concept.
    """
    by_caption = {example.caption: example for example in sources.forget}
    examples = []
    found = own_data.pictures(folder, "--forget_data")
    for i, picture in enumerate(found):
        usual = sources.forget[i % len(sources.forget)]
        caption = usual.caption if picture.caption is None else picture.caption
        anchor = picture.anchor or by_caption.get(caption, usual).anchor
        if anchor == caption:
            raise UserError(f"--forget_data: {picture.path} has {caption!r} for caption and anchor: give another one")
        examples.append(prompts.Example(caption, caption, anchor))
    paths = tuple(picture.path for picture in found)
    return sources._replace(forget=examples, owners=(0,) * len(examples), forget_pictures=paths)


def _names_any(text: str, words: list[tuple[str, ...]]) -> bool:
    return any(mentions(text, *of_concept) for of_concept in words)


def _some(kept: list[str], where: str) -> list[str]:
    """Return what is left of the user's captions; UserError if all of them name the concept."""
    if not kept:
        raise UserError(f"{where} names the concept in every caption: give some of what is to be kept")
    return kept
