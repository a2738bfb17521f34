"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv:2310.10012): prompts found without the model, by its text encoder alone.

    v = mean over pairs of E(p+) - E(p-)           what the concept adds to a prompt, E: last hidden state (L, D)
    find K tokens x that minimise |E(x) - (E(p) + eta v)|^2

by a genetic search as in the released notebooks: the better half lives on, each of it has two children with
probability `crossover`, each individual, parents included, then one token replaced with probability `mutation`. So the
best may be lost; the best of the last generation is decoded and sent as text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Generator, Tensor

from eval.attacks.base import (
    AttackSetup,
    AttackTarget,
    ConceptAttack,
    Finding,
    Preparation,
    at_least_one,
    images_of_one,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Fitness = Callable[[Tensor], Tensor]  # token ids (P, K) -> (P,), lower is better


def concept_vector(positive: Tensor, negative: Tensor) -> Tensor:
    """Return v (L, D) of hidden states (pairs, L, D) of prompts with and without the concept."""
    return (positive - negative).mean(0)


def distance(states: Tensor, wanted: Tensor) -> Tensor:
    """Return |E(x) - target|^2 of hidden states (P, L, D): (P,)."""
    return (states - wanted).square().flatten(1).sum(1)


def crossed(parents: Tensor, rate: float, rng: Generator) -> Tensor:
    """Return the parents (P, K), each followed by two children with a random partner with probability `rate`."""
    n, length = parents.shape
    rows = []
    for i in range(n):
        rows.append(parents[i])
        if torch.rand((), generator=rng) < rate:
            partner = int(torch.randint(n, (), generator=rng))
            cut = int(torch.randint(1, max(2, length), (), generator=rng))
            rows.append(torch.cat([parents[i, :cut], parents[partner, cut:]]))
            rows.append(torch.cat([parents[partner, :cut], parents[i, cut:]]))
    return torch.stack(rows)


def mutated(population: Tensor, rate: float, allowed: Tensor, rng: Generator) -> Tensor:
    """Return the population (P, K) with one token, out of `allowed`, replaced in a share `rate` of it."""
    n, length = population.shape
    hit = torch.rand(n, generator=rng) < rate
    place = torch.randint(length, (n,), generator=rng)
    token = allowed[torch.randint(len(allowed), (n,), generator=rng)]
    changed = population.clone()
    changed[hit, place[hit]] = token[hit]
    return changed


def evolved(
    population: Tensor,
    fitness: Fitness,
    generations: int,
    crossover: float,
    mutation: float,
    allowed: Tensor,
    rng: Generator,
) -> Tensor:
    """Return the best tokens (K,) of the last generation."""
    for _ in range(generations):
        better = fitness(population).argsort(stable=True)[: len(population) // 2]
        population = mutated(crossed(population[better], crossover, rng), mutation, allowed, rng)
    return population[fitness(population).argmin()]


@dataclass(frozen=True, kw_only=True)
class RingABell(ConceptAttack):
    """Defaults of the notebooks; eta is 3 for nudity, 5 and 5.5 for violence."""

    authors: ClassVar[str] = "Tsai et al., ICLR 2024"
    arxiv: ClassVar[str | None] = "2310.10012"
    box: ClassVar[Literal["white", "grey", "black"]] = "black"
    block: ClassVar[Literal["one", "batch", "all"]] = "one"

    eta: float = 3.0
    length: int = 16  # K, tokens of the prompt found
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "length", "population", "generations")

    @property
    def budget(self) -> str:
        """Return what the search may ask of the text encoder."""
        return f"{self.generations} generations of {self.population}, one picture"

    def prepare(self, setup: AttackSetup) -> Preparation:
        """Return the concept's vector, by the original's text encoder."""
        with torch.no_grad():
            positive = hidden_states(setup.original, [positive for positive, _ in setup.concept.pairs])
            negative = hidden_states(setup.original, [negative for _, negative in setup.concept.pairs])
        return Preparation({"v": concept_vector(positive, negative)})

    @torch.no_grad()
    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Search for a prompt for every target and send it."""
        return [self._one(setup, ready.tensors["v"], target) for target in targets]

    def _one(self, setup: AttackSetup, v: Tensor, target: AttackTarget) -> Finding:
        tokenizer = setup.original.tokenizer
        wanted = hidden_states(setup.original, [target.prompt])[0] + self.eta * v.to(setup.device)
        allowed = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        rng = setup.rng("ring-a-bell", target.row)
        first = allowed[torch.randint(len(allowed), (self.population, self.length), generator=rng)]

        def fitness(population: Tensor) -> Tensor:
            left = []
            for part in population.split(64):
                left.append(distance(states_of(setup.original, part), wanted).cpu())
            return torch.cat(left)

        best = evolved(first, fitness, self.generations, self.crossover, self.mutation, allowed, rng)
        text = tokenizer.decode(best)
        images = setup.sample_targets([target], [text])
        shown = setup.judge.shows(images)
        left = float(fitness(best[None]))
        return Finding(
            success=shown[0],
            image=images_of_one(images, shown),
            queries=1,
            found={"prompt": text, "tokens": best.tolist(), "distance": left},
        )


def hidden_states(pipe: DiffusionPipeline, texts: list[str]) -> Tensor:
    """Return E of texts: last hidden state (n, L, D), fp32, of the pipeline's first text encoder."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    return _encoded(pipe, torch.tensor(ids))


def states_of(pipe: DiffusionPipeline, tokens: Tensor) -> Tensor:
    """Return E of tokens (P, K): they stand between start and end, padded as the tokenizer pads."""
    tokenizer = pipe.tokenizer
    tokens = tokens[:, : tokenizer.model_max_length - 2]
    ids = torch.full((len(tokens), tokenizer.model_max_length), tokenizer.pad_token_id)
    ids[:, 0] = tokenizer.bos_token_id
    ids[:, 1 : tokens.shape[1] + 1] = tokens
    ids[:, tokens.shape[1] + 1] = tokenizer.eos_token_id
    return _encoded(pipe, ids)


def _encoded(pipe: DiffusionPipeline, ids: Tensor) -> Tensor:
    encoder = pipe.text_encoder
    return encoder(ids.to(encoder.device)).last_hidden_state.float()
