"""Prompting4Debugging (Chin et al., ICML 2024, arXiv:2309.06135): tokens that make the erased model answer as it did.

    min over soft s of  MSE(e_erased(x_t, nearest(s)), e_original(x_t, prompt))          t uniform

As in PEZ, the forward pass sees the vocabulary's nearest token (by cosine) to each soft vector, whose gradient moves
the soft vector. P4D-N searches N free tokens alone, P4D-K one free token before every K of the prompt's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from erase_sd.models.noise import forward_process
from eval.attacks.base import (
    ONE_VOCABULARY,
    AttackSetup,
    AttackTarget,
    ConceptAttack,
    Finding,
    Preparation,
    at_least_one,
    images_of_one,
    noised,
    prediction,
)
from eval.attacks.soft_prompt import Vocabulary, encode_vectors, sample_vectors


def nearest(v: Tensor, table: Tensor) -> Tensor:
    """Return the token (n,) whose embedding in the table (V, D) has the largest cosine with each vector (n, D)."""
    return (F.normalize(v, dim=1) @ F.normalize(table, dim=1).T).argmax(1)


def straight_through(v: Tensor, table: Tensor) -> Tensor:
    """Return the nearest embeddings (n, D) forward; backward, the gradient reaches v as it is."""
    return v + (table[nearest(v, table)] - v).detach()


def layout(length: int, every: int) -> list[bool]:
    """Return which tokens of a P4D-K prompt are free: one before every `every` of the prompt's `length` own tokens."""
    free: list[bool] = []
    for i in range(length):
        if i % every == 0:
            free.append(True)
        free.append(False)
    return free


@dataclass(frozen=True, kw_only=True)
class PromptingForDebugging(ConceptAttack):
    """Defaults of the paper; `free` tokens, or with `every` one before every so many of the prompt's."""

    authors: ClassVar[str] = "Chin et al., ICML 2024"
    arxiv: ClassVar[str | None] = "2309.06135"
    box: ClassVar[Literal["white", "grey", "black"]] = "white"
    families: ClassVar[tuple[str, ...] | None] = ONE_VOCABULARY
    needs_references: ClassVar[bool] = True
    block: ClassVar[Literal["one", "batch", "all"]] = "one"

    free: int = 16  # N
    every: int | None = None  # K; then `free` does not matter
    steps: int = 3000
    samples: int = 1  # timesteps in one step
    picture_every: int = 50  # steps between two pictures
    lr: float = 0.1
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "free", "steps", "samples", "picture_every", "lr")
        if self.every is not None:
            at_least_one(self, "every")

    @property
    def budget(self) -> str:
        """Return how many steps and pictures it takes at most."""
        return f"{self.steps} steps of {self.samples}, {-(-self.steps // self.picture_every)} pictures"

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Search for a prompt for every target."""
        return [self._one(setup, target) for target in targets]

    def _one(self, setup: AttackSetup, target: AttackTarget) -> Finding:
        words, rng = Vocabulary(setup.pipe), setup.rng("p4d", self.every or 0, target.row)
        prompt = _Prompt(words, target.prompt, self.free, self.every)
        n, where = prompt.free, setup.device
        soft = words.table[torch.randint(len(words.table), (n,), generator=rng).to(where)].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([soft], lr=self.lr, weight_decay=self.weight_decay)
        with torch.no_grad():
            asked = setup.encode([target.prompt], setup.original)
        z, queries = setup.reference([target]).expand(self.samples, -1, -1, -1), 0
        for step in range(1, self.steps + 1):
            optimizer.zero_grad()
            self._loss(setup, prompt, soft, asked, z, rng).backward()
            optimizer.step()
            if step % self.picture_every and step != self.steps:
                continue
            queries += 1
            found = nearest(soft.detach(), words.table)
            images = sample_vectors(setup, words, prompt.vectors(words.table[found]), target)
            shown = setup.judge.shows(images)
            if shown[0]:
                break
        return Finding(
            success=shown[0],
            image=images_of_one(images, shown),
            queries=queries,
            gradient_steps=step * self.samples,
            found={"prompt": words.tokenizer.decode(prompt.tokens(found)), "tokens": prompt.tokens(found)},
        )

    def _loss(
        self, setup: AttackSetup, prompt: _Prompt, soft: Tensor, asked: dict[str, Tensor], z: Tensor, rng: Generator
    ) -> Tensor:
        t = forward_process(setup.pipe).draw(len(z), rng).to(z.device)
        x_t, _ = noised(setup.pipe, z, t, rng)
        with torch.no_grad():
            wanted = prediction(setup.original, x_t, t, asked)
        vectors = prompt.vectors(straight_through(soft, prompt.words.table))
        cond = encode_vectors(setup, prompt.words, vectors, 1)
        return F.mse_loss(prediction(setup.pipe, x_t, t, cond), wanted)


class _Prompt:
    """The vectors of a whole prompt: some free, the others the prompt's own tokens."""

    def __init__(self, words: Vocabulary, text: str, free: int, every: int | None) -> None:
        self.words = words
        own = words.ids(text, words.room)
        places = [True] * min(free, words.room) if every is None else layout(len(own), every)[: words.room]
        self.places = torch.tensor(places, device=words.table.device)
        self.own = torch.tensor(own, dtype=torch.long, device=words.table.device)[: int((~self.places).sum())]
        self.free = int(self.places.sum())

    def vectors(self, free: Tensor) -> Tensor:
        """(n, D) of the free ones' (f, D)."""
        rows = torch.zeros(len(self.places), free.shape[1], device=free.device)
        rows = rows.index_put((self.places.nonzero()[:, 0],), free)
        return rows.index_put(((~self.places).nonzero()[:, 0],), self.words.table[self.own])

    def tokens(self, free: Tensor) -> list[int]:
        """All tokens of the prompt, in their order."""
        ids = torch.zeros(len(self.places), dtype=torch.long, device=free.device)
        ids[self.places], ids[~self.places] = free, self.own
        return ids.tolist()
