"""The forward process: what noise does to latents, and what a network answers to it.

diffusion  x_t = a_t x_0 + s_t eps               target eps, v = a_t eps - s_t x_0, or x_0, as the scheduler says
flow       x_t = (1 - sigma) x_0 + sigma eps     target eps - x_0,  t = 1000 sigma
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class ForwardProcess(Protocol):
    """How noise is added to latents; latents and noise are (n, C, H, W), timesteps (n,)."""

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw n timesteps as training does."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should answer at x_t."""


class Diffusion:
    """The betas and prediction type of the pipeline's own sampler, whatever sampler that is."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw uniformly over the training timesteps."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (n,), generator=rng)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return a_t x_0 + s_t eps."""
        return self.scheduler.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noise, velocity or the clean latent, as the scheduler says."""
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(x0, noise, t)
        return {"epsilon": noise, "sample": x0}[kind]


class Flow:
    """Rectified flow (Liu et al. 2023, arXiv 2209.03003) with the scheduler's own shift towards noise."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Draw logit-normally (Esser et al. 2024, arXiv 2403.03206, section 3.1), on the scheduler's grid."""
        u = torch.randn(n, generator=rng).sigmoid()
        return self.scheduler.timesteps[(u * len(self.scheduler.timesteps)).long()]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return (1 - sigma) x_0 + sigma eps."""
        sigma = (t / self.scheduler.config.num_train_timesteps).view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return eps - x_0, whatever the timestep."""
        return noise - x0


def forward_process(pipe: DiffusionPipeline) -> ForwardProcess:
    """Return the forward process that the pipeline's network was trained on."""
    return Flow(pipe) if "Flow" in type(pipe.scheduler).__name__ else Diffusion(pipe)
