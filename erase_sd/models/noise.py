"""The forward process: what noise does to latents, and what a network answers to it.

diffusion  x_t = a_t x_0 + s_t eps               target eps, v = a_t eps - s_t x_0, or x_0, as the scheduler says
flow       x_t = (1 - sigma) x_0 + sigma eps     target eps - x_0,  t = 1000 sigma
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Generator, Tensor


class ForwardProcess(Protocol):
    """Latents and noise are (n, C, H, W), timesteps (n,)."""

    def draw(self, n: int, rng: Generator) -> Tensor:
        """n timesteps as training draws them."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t."""

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return at x_t."""


class Diffusion:
    """Betas and prediction type of the pipeline's own sampler, whatever sampler that is."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Uniform over the training timesteps."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (n,), generator=rng)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """a_t x_0 + s_t eps."""
        return self.scheduler.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise, velocity or the clean latent."""
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(x0, noise, t)
        return {"epsilon": noise, "sample": x0}[kind]


class Flow:
    """Rectified flow (Liu et al. 2023, arXiv 2209.03003) with the scheduler's own shift towards noise."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

    def draw(self, n: int, rng: Generator) -> Tensor:
        """Logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1), on the scheduler's grid."""
        u = torch.randn(n, generator=rng).sigmoid()
        return self.scheduler.timesteps[(u * len(self.scheduler.timesteps)).long()]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """(1 - sigma) x_0 + sigma eps."""
        sigma = (t / self.scheduler.config.num_train_timesteps).view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps - x_0, whatever the timestep."""
        return noise - x0


def forward_process(pipe: DiffusionPipeline) -> ForwardProcess:
    """The forward process that the pipeline's network was trained on."""
    return Flow(pipe) if "Flow" in type(pipe.scheduler).__name__ else Diffusion(pipe)
