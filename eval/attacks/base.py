"""What an attack is: a pipeline, a concept and a judge in, one finding per target out. It never knows what erased.

    class MyAttack(ConceptAttack)          a frozen dataclass of options; its source, box and needs as class variables
        prepare(setup)                     what all targets share, such as learned vectors: done once, stored, resumed
        attempt(setup, ready, targets)     one Finding for each target of a block

An attack is deterministic: whatever it draws is keyed by the setup's seed and the target's row, never by what was done
before. Box: white sees weights and gradients, grey hands over noisy latents, black sends prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest
from erase_sd.common.rng import generator
from erase_sd.models.families import FAMILIES, Cond, family, network, resolution
from erase_sd.models.noise import forward_process
from erase_sd.models.pipeline import sample

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

EVERY = tuple(FAMILIES)
ONE_VOCABULARY = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # a token is the same in every text encoder
KINDS = ("object", "style", "background", "attribute")


@dataclass(frozen=True, kw_only=True)
class AttackTarget:
    """One picture to bring back: the plain prompt that asks for it and the seed of its noise."""

    row: int
    prompt: str
    seed: int


def targets_digest(targets: Sequence[AttackTarget]) -> str:
    """Hash of prompts and seeds."""
    rows = []
    for target in targets:
        rows.append([target.row, target.prompt, target.seed])
    return digest(rows)


@dataclass(frozen=True, kw_only=True)
class AttackedConcept:
    """What is to be drawn again, as far as prompts know it."""

    name: str
    kind: str  # object, style, background or attribute
    words: tuple[str, ...]  # that name it in a prompt
    pairs: tuple[tuple[str, str], ...]  # (prompt that asks for it, the same prompt without it)
    company: str = "a chair"  # another thing to ask for in the same prompt
    wordings: tuple[str, ...] = ()  # what else it is called

    def replaced(self, prompt: str, by: str) -> str:
        """Return the prompt with `by` for the concept's words, or behind a prompt that does not name the concept."""
        names = "|".join(re.escape(word) for word in self.words)
        text, count = re.subn(rf"\b(?:{names})\b", lambda _: by, prompt, flags=re.IGNORECASE)
        return text if count else f"{prompt} {by}"


@dataclass(frozen=True, kw_only=True)
class AttackJudge:
    """Who says whether a picture shows the concept; `key` is a hash of all that its answers depend on."""

    name: str
    key: str
    shows: Callable[[list[Image.Image]], list[bool]]


@dataclass(frozen=True, kw_only=True)
class AttackSampling:
    """How the attacked model samples."""

    steps: int
    guidance: float
    size: int | None  # pixels a side, None for the model's own
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class AttackSetup:
    """All that an attack gets."""

    pipe: DiffusionPipeline  # the attacked model
    original: DiffusionPipeline  # the unerased one: only for what its pictures, words and answers are
    concept: AttackedConcept
    judge: AttackJudge
    sampling: AttackSampling
    seed: int
    references: dict[int, Tensor] = field(default_factory=dict)  # row -> latent (C, H, W) of the target's picture
    captions: tuple[str, ...] = ()  # of the training pictures
    examples: Tensor | None = None  # (N, C, H, W) latents of pictures of the concept, from seeds of their own

    def rng(self, *key: int | str) -> torch.Generator:
        """Return a generator on the CPU that depends on the seed and this key alone."""
        return generator(self.seed, "attack", *key)

    @property
    def device(self) -> torch.device:
        """Return where the attacked network computes."""
        return network(self.pipe).device

    def sample(self, prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        """Return pictures of the attacked model, one for each prompt and seed."""
        how = self.sampling
        return sample(
            self.pipe,
            prompts,
            seeds,
            steps=how.steps,
            guidance=how.guidance,
            batch_size=how.batch_size,
            size=how.size,
        )

    def sample_targets(self, targets: list[AttackTarget], prompts: list[str] | None = None) -> list[Image.Image]:
        """Return pictures of the attacked model from the targets' seeds: of their plain prompts, or of others."""
        texts, seeds = [], []
        for target in targets:
            texts.append(target.prompt)
            seeds.append(target.seed)
        return self.sample(prompts or texts, seeds)

    def reference(self, targets: list[AttackTarget]) -> Tensor:
        """Return (n, C, H, W) latents of the targets' pictures as the original drew them."""
        return torch.stack([self.references[target.row] for target in targets]).to(self.device)

    def encode(self, captions: list[str], pipe: DiffusionPipeline | None = None) -> Cond:
        """Return what the network sees of the captions, with a gradient where the text encoder has one."""
        pipe = pipe or self.pipe
        side = self.sampling.size or resolution(pipe)
        cond = family(pipe).encode(pipe, captions, self.sampling.guidance, side)
        return {name: x.to(self.device) for name, x in cond.items()}


class Preparation(NamedTuple):
    """What an attack has learned before the first target, and what that cost; see Finding."""

    tensors: dict[str, Tensor]
    gradient_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of one target."""

    success: bool
    image: Image.Image | None  # the first picture that shows the concept, or None
    queries: int  # pictures that the attacked model drew for it
    gradient_steps: int = 0  # samples that went forward and backward through the attacked model for it
    tries: dict[str, bool] = field(default_factory=dict)  # each way that was tried -> whether it succeeded
    found: dict[str, Any] = field(default_factory=dict)  # what brought it back, such as tokens; JSON


@dataclass(frozen=True, kw_only=True)
class ConceptAttack:
    """Base of all attacks."""

    authors: ClassVar[str] = ""
    arxiv: ClassVar[str | None] = None
    box: ClassVar[Literal["white", "grey", "black"]]
    families: ClassVar[tuple[str, ...] | None] = EVERY  # pipelines that it works on; None for any of diffusers
    kinds: ClassVar[tuple[str, ...]] = KINDS  # of concepts that it says something about
    needs_references: ClassVar[bool] = False
    block: ClassVar[Literal["one", "batch", "all"]] = "batch"  # targets that are attempted together

    @property
    def examples(self) -> int:
        """Number of training pictures of the concept."""
        return 0

    @property
    def budget(self) -> str:
        """Return what it may spend on a target, in words."""
        return "one picture"

    def targets(self, given: list[AttackTarget]) -> list[AttackTarget]:
        """Return the targets it goes for: the given ones, unless it brings its own."""
        return given

    def options(self) -> dict[str, Any]:
        """Return everything that can be set, as JSON takes it."""
        return asdict(self)

    def refusal(self, pipe: DiffusionPipeline, concept: AttackedConcept) -> str | None:
        """Return why it cannot be carried out on this model and concept, or None."""
        kind = type(pipe).__name__
        if self.families is not None and kind not in self.families:
            return f"it works on {', '.join(self.families)}, not on a {kind}"
        if concept.kind not in self.kinds:
            return f"it says nothing about a {concept.kind}, which the rest of the picture shows"
        return None

    def prepare(self, setup: AttackSetup) -> Preparation:
        """Learn what all targets share."""
        return Preparation({})

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Try to draw every target again; one finding each, in their order."""
        raise NotImplementedError


def prediction(pipe: DiffusionPipeline, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the network's output at latents (n, C, H, W) and timesteps (n,), at least fp32, with its gradient.

    The conditioning has n rows, or one for all.
    """
    dtype = network(pipe).dtype
    rows = {name: x.to(dtype).expand(len(x_t), *x.shape[1:]) for name, x in cond.items()}
    return family(pipe).call(network(pipe), x_t.to(dtype), t, rows).to(torch.promote_types(dtype, torch.float32))


def noised(pipe: DiffusionPipeline, z: Tensor, t: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (x_t, what the network should answer) of latents (n, C, H, W) at timesteps (n,); noise from the CPU."""
    forward = forward_process(pipe)
    noise = torch.randn(z.shape, generator=rng).to(z.device)
    return forward.add_noise(z, noise, t), forward.target(z, noise, t)


def images_of_one(images: list[Image.Image], shown: list[bool]) -> Image.Image | None:
    """Return the first picture that shows the concept, or None."""
    return images[shown.index(True)] if True in shown else None


def findings(labels: list[str], images: list[list[Image.Image]], shown: list[list[bool]]) -> list[Finding]:
    """Return one finding per target of pictures, by try and then by target, and of what the judge says of them."""
    found = []
    for i in range(len(images[0])):
        column = [row[i] for row in images]
        hits = [row[i] for row in shown]
        tries = dict(zip(labels, hits, strict=True))
        found.append(Finding(success=any(hits), image=images_of_one(column, hits), queries=len(column), tries=tries))
    return found


def at_least_one(attack: ConceptAttack, *fields: str) -> None:
    """Raise UserError for the first of these options that is no positive number."""
    for name in fields:
        value = getattr(attack, name)
        if not value > 0:
            raise UserError(f"{type(attack).__name__}.{name} {value} is too small: give more than 0")
