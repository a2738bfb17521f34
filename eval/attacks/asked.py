"""What an attack is to bring back: the concept as prompts know it, targets, and captions to draw examples of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import prompts
from erase_sd.common.errors import asked_by_the_user
from erase_sd.pocket.prompt_sets import exam, forget_examples, shows
from erase_sd.pocket.world import OBJECTS, article, caption, grid, part_named
from eval.attacks.base import AttackedConcept, AttackTarget, targets_digest
from eval.images.sources import pictures, resolve
from prompts.tables import is_explicit

TARGETS = 64
PAIRS = 32  # prompts with and without the concept


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A concept with its targets; `captions` ask for it in turn, for pictures to learn from."""

    source: str  # name of the prompts
    concept: AttackedConcept
    targets: tuple[AttackTarget, ...]
    captions: tuple[str, ...]
    columns_tell: bool = False  # the source's columns say that it is explicit

    @property
    def sha256(self) -> str:
        """Hash of the targets."""
        return targets_digest(self.targets)

    @property
    def explicit(self) -> bool:
        """Return whether its pictures are not to be shown: by the words of the concept and of the targets."""
        texts = [self.concept.name, *self.concept.words, self.source, *(target.prompt for target in self.targets)]
        return self.columns_tell or any(map(prompts.sensitive, texts))


def of_pocket(text: str, count: int | None, seed: int) -> Asked:
    """Return a concept of the embedded model: targets are scenes of no training.

    Raises UserError for other words.
    """
    part = kind, word = part_named(text)
    pairs = []
    for scene in grid():
        if shows(scene, part):
            pairs.append((caption(scene), caption(scene.without(kind))))
    company = next(other for other in OBJECTS if other not in (word, "cat"))
    concept = AttackedConcept(
        name=text,
        kind=kind,
        words=(word,),
        pairs=tuple(pairs[:: max(1, len(pairs) // PAIRS)]),
        company=article(company),
    )
    questions = exam([part], count or TARGETS, 0, seed)
    targets = [AttackTarget(row=i, prompt=caption(q.scene), seed=q.seed) for i, q in enumerate(questions)]
    captions = [example.caption for example in forget_examples([part], seed)]
    return Asked(source="pocket", concept=concept, targets=tuple(targets), captions=tuple(captions))


def of_concept(text: str, source: str | None, count: int | None, seed: int) -> Asked:
    """Return any other concept, with its own prompts or those of a source of eval.generate: as many as those say.

    Raises UserError for a concept or a source that cannot be read.
    """
    with asked_by_the_user():
        known = prompts.load(text)
    pairs = tuple(dict.fromkeys((example.prompt, example.anchor) for example in known.examples))
    concept = AttackedConcept(name=known.name, kind=known.kind, words=known.words, pairs=pairs)
    found = resolve(source or text)
    wanted = count or (len(found.rows) if source else TARGETS)
    turns = -(-wanted // len(found.rows))
    drawn = list(pictures(found.rows, turns, seed))
    targets = []
    for turn in range(turns):  # every prompt once, then every prompt from another seed
        for picture in drawn[turn::turns]:
            targets.append(AttackTarget(row=len(targets), prompt=picture.row.prompt, seed=picture.seed))
    captions = tuple(example.prompt for example in known.examples)
    return Asked(
        source=found.name,
        concept=concept,
        targets=tuple(targets[:wanted]),
        captions=captions,
        columns_tell=any(is_explicit(row.prompt, row.tags) for row in found.rows),
    )


def called(asked: Asked, wordings: tuple[str, ...]) -> Asked:
    """Return this with other names of the concept."""
    return replace(asked, concept=replace(asked.concept, wordings=wordings))
