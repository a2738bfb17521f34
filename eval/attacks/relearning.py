"""Relearning: fine-tune the erased model on k pictures of the concept until its plain prompts draw it again.

The targets' seeds are others than the pictures'. A target counts as brought back at the first check whose picture
shows the concept; the result's tries are the shares at every check, and its steps to half those after which half of
the targets are back. Read it beside Retrain, which learns the concept for the first time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.models.families import family, network
from erase_sd.models.noise import forward_process
from eval.attacks.base import (
    EVERY,
    AttackedConcept,
    AttackSetup,
    AttackTarget,
    ConceptAttack,
    Finding,
    Preparation,
    at_least_one,
    findings,
    noised,
    prediction,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Relearning(ConceptAttack):
    """AdamW on the whole network; `checks` are the steps after which the targets are drawn."""

    authors: ClassVar[str] = "Scissorhands' relearn time; Golatkar et al., CVPR 2020"
    box: ClassVar[Literal["white", "grey", "black"]] = "white"
    block: ClassVar[Literal["one", "batch", "all"]] = "all"

    pictures: int = 8  # k
    checks: tuple[int, ...] = (5, 10, 20, 40, 100)
    batch_size: int = 8  # at most; never more than there are pictures
    lr: float = 5e-5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "pictures", "batch_size", "lr")
        if not self.checks or list(self.checks) != sorted({step for step in self.checks if step > 0}):
            raise UserError(f"relearning.checks {self.checks} must rise from 1 or more, such as 5,20,100")

    @property
    def examples(self) -> int:
        """Return pictures that it learns from."""
        return self.pictures

    def refusal(self, pipe: DiffusionPipeline, concept: AttackedConcept) -> str | None:
        """Refuse, besides, numbers in which small steps vanish."""
        fine = type(pipe).__name__ not in EVERY or network(pipe).dtype == torch.float32
        return super().refusal(pipe, concept) or (None if fine else "it fine-tunes, which needs --dtype float32")

    @property
    def budget(self) -> str:
        """Return how many steps and pictures it takes at most."""
        return f"{self.checks[-1]} steps on {self.pictures} pictures, {len(self.checks)} pictures of a target"

    def prepare(self, setup: AttackSetup) -> Preparation:
        """Count what the fine-tuning costs: a network for every check is too much to keep."""
        return Preparation({}, self.checks[-1] * min(self.batch_size, self.pictures))

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Fine-tune a copy and draw all targets at every check."""
        labels, images, shown = [], [], []
        for step, pipe in tuned(self, setup):
            taught = replace(setup, pipe=pipe)
            labels.append(f"{step} steps")
            images.append(taught.sample_targets(targets))
            shown.append(setup.judge.shows(images[-1]))
        found = findings(labels, images, shown)
        counted = []
        for i, finding in enumerate(found):
            first = first_check(self.checks, [row[i] for row in shown])
            counted.append(replace(finding, found={"steps": first}))
        return counted


def first_check(checks: tuple[int, ...], shown: list[bool]) -> int | None:
    """Return the steps of the first check at which the concept was back, None if it never was."""
    return next((step for step, back in zip(checks, shown, strict=True) if back), None)


def tuned(attack: Relearning, setup: AttackSetup) -> Iterator[tuple[int, DiffusionPipeline]]:
    """Return (steps, pipeline) at every check of the fine-tuning; the attacked model itself stays as it is."""
    learner = copy.copy(setup.pipe)
    setattr(learner, family(learner).part, copy.deepcopy(network(setup.pipe)))
    weights = list(network(learner).requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(weights, lr=attack.lr, weight_decay=attack.weight_decay)
    rng = setup.rng("relearning", attack.pictures)
    z = setup.examples[: attack.pictures].to(setup.device)
    with torch.no_grad():
        conds = setup.encode(list(setup.captions[: attack.pictures]))
    for step in range(1, attack.checks[-1] + 1):
        rows = torch.randperm(len(z), generator=rng)[: attack.batch_size].to(z.device)
        optimizer.zero_grad()
        _loss(learner, z[rows], {name: x[rows] for name, x in conds.items()}, rng).backward()
        optimizer.step()
        if step in attack.checks:
            yield step, learner


def _loss(pipe: DiffusionPipeline, z: Tensor, cond: dict[str, Tensor], rng: torch.Generator) -> Tensor:
    t = forward_process(pipe).draw(len(z), rng).to(z.device)
    x_t, wanted = noised(pipe, z, t, rng)
    return F.mse_loss(prediction(pipe, x_t, t, cond), wanted)
