"""TINA (arXiv:2603.17828): no text at all. The noise from which the erased model draws a reference picture unasked.

    DDIM    z_t = C1 z_(t-1) + C2 e(z_t, t)        C1 = sqrt(a_t / a_(t-1))
                                                   C2 = sqrt(1 - a_t) - sqrt(a_t (1 - a_(t-1)) / a_(t-1))

Plain inversion puts e(z_(t-1), t) in the place of e(z_t, t) and errs; here it is only the start from which, at every
timestep, AdamW minimises |C1 z_(t-1) + C2 e(z_t, t) - z_t|^2 over z_t. DDIM then runs from the last z back, with the
empty prompt both ways. One picture is inverted, so what a model that never saw the concept lets through is the
attack's own doing: read it beside Retrain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from eval.attacks.base import (
    AttackSetup,
    AttackTarget,
    ConceptAttack,
    Finding,
    Preparation,
    at_least_one,
    findings,
    prediction,
)
from eval.attacks.steering import ddim

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Eps = Callable[[Tensor, int], Tensor]  # (z, t) -> noise


def coefficients(a_t: Tensor, a_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return C1 and C2 of cumulative alphas at a timestep and at the less noisy one before it."""
    return (a_t / a_before).sqrt(), (1 - a_t).sqrt() - (a_t * (1 - a_before) / a_before).sqrt()


def inverted(z: Tensor, eps: Eps, timesteps: list[int], alphas: list[Tensor], steps: int, lr: float) -> Tensor:
    """Return z_T of z_0 (n, C, H, W) through rising timesteps; alphas[0] is z_0's, alphas[i + 1] timestep i's."""
    for i, t in enumerate(timesteps):
        c1, c2 = coefficients(alphas[i + 1], alphas[i])
        with torch.no_grad():
            start = c1 * z + c2 * eps(z, t)
        z_t = start.requires_grad_(True)
        optimizer = torch.optim.AdamW([z_t], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            (c1 * z + c2 * eps(z_t, t) - z_t).square().sum().backward()
            optimizer.step()
        z = z_t.detach()
    return z


@torch.no_grad()
def denoised(z: Tensor, eps: Eps, timesteps: list[int], alphas: list[Tensor]) -> Tensor:
    """Return z_0 of z_T by DDIM: the relation above, solved for z_(t-1)."""
    for i in reversed(range(len(timesteps))):
        c1, c2 = coefficients(alphas[i + 1], alphas[i])
        z = (z - c2 * eps(z, timesteps[i])) / c1
    return z


@dataclass(frozen=True, kw_only=True)
class Tina(ConceptAttack):
    """The paper's numbers: 50 timesteps of 25 optimised steps."""

    authors: ClassVar[str] = "TINA, arXiv 2026"
    arxiv: ClassVar[str | None] = "2603.17828"
    box: ClassVar[Literal["white", "grey", "black"]] = "white"
    families: ClassVar[tuple[str, ...] | None] = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    needs_references: ClassVar[bool] = True

    timesteps: int = 50
    steps: int = 25  # at each timestep
    lr: float = 1e-3

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least_one(self, "timesteps", "steps", "lr")

    @property
    def budget(self) -> str:
        """Return how many steps a target takes."""
        return f"{self.timesteps} x {self.steps} steps, one picture"

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Invert every target's reference picture and draw from what comes out."""
        scheduler = ddim(setup.pipe)
        scheduler.set_timesteps(self.timesteps)
        timesteps = scheduler.timesteps.flip(0).tolist()
        table = scheduler.alphas_cumprod.to(setup.device)
        alphas = [scheduler.final_alpha_cumprod.to(setup.device), *(table[t] for t in timesteps)]
        with torch.no_grad():
            nothing = setup.encode([""])
        eps = noise_of(setup.pipe, nothing, table)
        z_T = inverted(setup.reference(targets), eps, timesteps, alphas, self.steps, self.lr)
        images = decoded(setup.pipe, denoised(z_T, eps, timesteps, alphas))
        found = findings(["inversion of a picture"], [images], [setup.judge.shows(images)])
        return [replace(finding, gradient_steps=self.timesteps * self.steps) for finding in found]


def noise_of(pipe: DiffusionPipeline, cond: dict[str, Tensor], alphas: Tensor) -> Eps:
    """Return e(z, t) of a network that predicts noise, velocity or the clean latent."""
    kind = pipe.scheduler.config.prediction_type

    def eps(z: Tensor, t: int) -> Tensor:
        answer = prediction(pipe, z, torch.full((len(z),), t, device=z.device), cond)
        a = alphas[t]
        if kind == "v_prediction":
            return a.sqrt() * answer + (1 - a).sqrt() * z
        return answer if kind == "epsilon" else (z - a.sqrt() * answer) / (1 - a).sqrt()

    return eps


@torch.no_grad()
def decoded(pipe: DiffusionPipeline, z: Tensor) -> list[Image.Image]:
    """Return pictures of latents (n, C, H, W), as the pipeline decodes its own."""
    config = pipe.vae.config
    z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
    pixels = pipe.vae.decode(z.to(pipe.vae.dtype)).sample
    return pipe.image_processor.postprocess(pixels, output_type="pil")
