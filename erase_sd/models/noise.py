"""The forward process: what noise does to latents, and what a network answers to it.

diffusion  x_t = a_t x_0 + s_t eps               target eps, v = a_t eps - s_t x_0, or x_0, as the scheduler says
flow       x_t = (1 - sigma) x_0 + sigma eps     target eps - x_0,  t = 1000 sigma
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Generator, Tensor

from erase_sd.common.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

DIFFUSION = {  # samplers of the same forward process: DDPM's, whose betas are in their config
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
ANSWERS = ("epsilon", "v_prediction", "sample")  # what a network of DDPM's process may predict


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
    """Return the forward process that the pipeline's network was trained on. Raises UserError for an unknown one."""
    check_scheduler(pipe.scheduler)
    return Flow(pipe) if type(pipe.scheduler).__name__ in FLOW else Diffusion(pipe)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler whose forward process is not known: the network would be trained on another. UserError."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in FLOW:
        return
    odd = ""
    if name in DIFFUSION:
        if config.get("use_flow_sigmas"):
            odd = " with use_flow_sigmas"
        elif config.get("timestep_type") == "continuous":
            odd = " with continuous timesteps"
        elif config.get("prediction_type", "epsilon") not in ANSWERS:
            odd = f" with prediction_type {config['prediction_type']}"
        else:
            return
    raise UserError(
        f"the pipeline's scheduler, a {name}{odd}, adds noise in a way that is not known here: models of DDPM's noise "
        "or of flow matching can be erased, give one with its own scheduler"
    )
