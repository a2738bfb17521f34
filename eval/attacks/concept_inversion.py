"""Concept Inversion (Pham et al., ICLR 2024, arXiv:2308.01508): textual inversion on the erased model.

    min over v of  MSE(e(x_t, caption with v in the place of the concept's words), target)

v is one learned token embedding, or several, for each text encoder; network and text encoders are frozen. It is
learned once from pictures of the concept that the original drew, and then asked for on every target's prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_sd.models.noise import forward_process
from eval.attacks.base import (
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
from eval.attacks.soft_prompt import encoders, markers, soft_tokens, tables


@dataclass(frozen=True, kw_only=True)
class ConceptInversion(ConceptAttack):
    """Defaults of the released scripts: one token, 5000 steps of 4 x 4 pictures, 5e-3 scaled by these 16."""

    authors: ClassVar[str] = "Pham et al., ICLR 2024"
    arxiv: ClassVar[str | None] = "2308.01508"
    box: ClassVar[Literal["white", "grey", "black"]] = "white"

    vectors: int = 1
    pictures: int = 25
    steps: int = 5000
    batch_size: int = 16
    lr: float = 0.08
    weight_decay: float = 0.01
    word: str = "art"  # whose embedding the first vector starts from; the others start halfway to a random token

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "vectors", "pictures", "steps", "batch_size", "lr")

    @property
    def examples(self) -> int:
        """Return pictures that it learns from."""
        return self.pictures

    @property
    def budget(self) -> str:
        """Return what learning costs; a target is one picture."""
        return f"{self.vectors} vectors, {self.steps} steps of {self.batch_size} once, one picture"

    def prepare(self, setup: AttackSetup) -> Preparation:
        """Return the learned vectors {text encoder: (vectors, D)}."""
        rng = setup.rng("inversion")
        marked = markers(setup.pipe, self.vectors)
        captions = [setup.concept.replaced(caption, marked) for caption in setup.captions[: self.pictures]]
        z = setup.examples[: self.pictures].to(setup.device)
        learned = {name: x.requires_grad_(True) for name, x in self._start(setup, rng).items()}
        optimizer = torch.optim.AdamW(learned.values(), lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            rows = torch.randint(len(z), (self.batch_size,), generator=rng)
            t = forward_process(setup.pipe).draw(self.batch_size, rng).to(z.device)
            x_t, wanted = noised(setup.pipe, z[rows.to(z.device)], t, rng)
            with soft_tokens(setup.pipe, learned):
                cond = setup.encode([captions[row] for row in rows.tolist()])
            optimizer.zero_grad()
            F.mse_loss(prediction(setup.pipe, x_t, t, cond), wanted).backward()
            optimizer.step()
        return Preparation({name: x.detach().cpu() for name, x in learned.items()}, self.steps * self.batch_size)

    def _start(self, setup: AttackSetup, rng: torch.Generator) -> dict[str, Tensor]:
        """Where learning starts: the word's embedding, and points between it and random tokens."""
        start = {}
        for name, table in tables(setup.pipe).items():
            tokenizer = encoders(setup.pipe)[name][1]
            first = table[tokenizer(self.word, add_special_tokens=False).input_ids[0]]
            others = table[torch.randint(len(table), (self.vectors - 1,), generator=rng).to(table.device)]
            start[name] = torch.cat([first[None], (first + others) / 2]).clone()
        return start

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Ask for the learned vectors in the place of the concept's words."""
        marked = markers(setup.pipe, self.vectors)
        prompts = [setup.concept.replaced(target.prompt, marked) for target in targets]
        vectors = {name: x.to(setup.device) for name, x in ready.tensors.items()}
        with soft_tokens(setup.pipe, vectors):
            images = setup.sample_targets(targets, prompts)
        return findings(["inversion"], [images], [setup.judge.shows(images)])
