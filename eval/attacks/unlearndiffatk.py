"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv:2310.11868): a prefix with which a model denoises a picture.

    min over P in simplex^k of  MSE(e(x_t, [tokens ~ P, prompt]), target)        x_t: the noised reference picture

The rows of P (k x |V|) start uniform. A step samples one token per row, passes the gradient straight through with
every entry clamped to [-1, 1], moves P by Adam and projects its rows onto the simplex. Timesteps are worked through
from low to high; after each of them the likeliest tokens draw a picture, and the first success ends the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

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


def projected(p: Tensor) -> Tensor:
    """Return the nearest point of the simplex to each row: max(p - theta, 0), theta so that it sums to 1.

    Held, Wolfe and Crowder 1974: theta = (sum of the m largest - 1) / m for the largest m that leaves them positive.
    """
    ordered = p.sort(dim=1, descending=True).values
    theta = (ordered.cumsum(1) - 1) / torch.arange(1, p.shape[1] + 1, device=p.device)
    m = (ordered > theta).sum(1, keepdim=True)
    return (p - theta.gather(1, m - 1)).clamp(min=0)


class SampledTokens(torch.autograd.Function):
    """One-hot rows of sampled tokens; backward, the gradient reaches the probabilities with entries in [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, tokens: Tensor) -> Tensor:
        """Return one-hot rows (k, V) of tokens (k,); p (k, V) are their probabilities."""
        return F.one_hot(tokens, p.shape[1]).to(p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient straight through, clamped."""
        return gradient.clamp(-1, 1), None


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk(ConceptAttack):
    """Defaults of the released code; k is 5 for nudity, violence and illegal activity, 3 for styles and objects."""

    authors: ClassVar[str] = "Zhang et al., ECCV 2024"
    arxiv: ClassVar[str | None] = "2310.11868"
    box: ClassVar[Literal["white", "grey", "black"]] = "white"
    families: ClassVar[tuple[str, ...] | None] = ONE_VOCABULARY
    needs_references: ClassVar[bool] = True
    block: ClassVar[Literal["one", "batch", "all"]] = "one"

    tokens: int = 5  # k
    timesteps: int = 50  # visited, evenly: 10, 30, ..., 990
    iterations: int = 40  # at each of them
    samples: int = 1  # draws of noise and tokens in one iteration
    lr: float = 0.01
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "tokens", "timesteps", "iterations", "samples", "lr")

    @property
    def budget(self) -> str:
        """Return how many steps and pictures it takes at most."""
        return f"{self.timesteps * self.iterations} steps of {self.samples}, {self.timesteps} pictures"

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Search for a prefix for every target."""
        return [self._one(setup, target) for target in targets]

    def _one(self, setup: AttackSetup, target: AttackTarget) -> Finding:
        words = Vocabulary(setup.pipe)
        rest = words.table[words.ids(target.prompt, words.room - self.tokens)]
        z, rng = setup.reference([target]), setup.rng("unlearndiffatk", target.row)
        size = (self.tokens, len(words.table))
        p = torch.full(size, 1 / size[1], device=setup.device, requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=self.lr, weight_decay=self.weight_decay)
        queries = 0
        for t in visited(self.timesteps):
            for _ in range(self.iterations):
                optimizer.zero_grad()
                self._loss(setup, words, rest, p, z, t, rng).backward()
                optimizer.step()
                p.data = projected(p.data)
            queries += 1
            found = p.argmax(1)
            images = sample_vectors(setup, words, torch.cat([words.table[found], rest]), target)
            shown = setup.judge.shows(images)
            if shown[0]:
                break
        return Finding(
            success=shown[0],
            image=images_of_one(images, shown),
            queries=queries,
            gradient_steps=queries * self.iterations * self.samples,
            found={"prefix": words.tokenizer.decode(found), "tokens": found.tolist()},
        )

    def _loss(
        self, setup: AttackSetup, words: Vocabulary, rest: Tensor, p: Tensor, z: Tensor, t: int, rng: Generator
    ) -> Tensor:
        prompts = []
        for _ in range(self.samples):
            tokens = torch.multinomial(p.detach().cpu(), 1, generator=rng)[:, 0].to(p.device)
            prompts.append(torch.cat([SampledTokens.apply(p, tokens) @ words.table, rest]))
        return denoising_loss(setup, words, torch.stack(prompts), z.expand(self.samples, -1, -1, -1), t, rng)


def visited(n: int) -> list[int]:
    """Return n timesteps in the middle of equal parts of the thousand: 10, 30, ..., 990 for 50."""
    return [int((i + 0.5) * 1000 / n) for i in range(n)]


def denoising_loss(
    setup: AttackSetup, words: Vocabulary, vectors: Tensor, z: Tensor, t: int, rng: Generator
) -> Tensor:
    """Return the MSE of the attacked model's answer to prompts of vectors (B, n, D) on latents (B, C, H, W) at t."""
    times = torch.full((len(z),), t, device=z.device)
    x_t, wanted = noised(setup.pipe, z, times, rng)
    cond = encode_vectors(setup, words, vectors, len(z))
    return F.mse_loss(prediction(setup.pipe, x_t, times, cond), wanted)
