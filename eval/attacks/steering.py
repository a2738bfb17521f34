"""Latents handed over in the middle of sampling, through the pipeline's own callback, which every family has.

Noise models draw by DDIM meanwhile: it keeps no history of earlier steps, which a latent from elsewhere would lack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.models.families import family
from erase_sd.models.noise import forward_process
from eval.attacks.base import AttackSetup, AttackTarget

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline

# (steps done, the timestep that comes next or None, latents (n, C, H, W)) -> the latents to go on with
Steer = Callable[[int, Tensor | None, Tensor], Tensor]


def ddim(pipe: DiffusionPipeline) -> DDIMScheduler:
    """Return DDIM on the betas of a noise model; the class's defaults would ruin a stored Euler's or DPM++'s."""
    from diffusers import DDIMScheduler

    stored = pipe.scheduler.config
    unsaid = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    said = {name: stored[name] for name in unsaid if name in stored}
    return DDIMScheduler.from_config(stored, **unsaid | said)


def memoryless(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return the pipeline with a scheduler of its own that goes on from any latent: DDIM, or a flow's Euler."""
    quiet = copy.copy(pipe)
    flow = "Flow" in type(pipe.scheduler).__name__
    quiet.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config) if flow else ddim(pipe)
    quiet.set_progress_bar_config(disable=True)
    return quiet


def steered(
    setup: AttackSetup,
    pipe: DiffusionPipeline,
    targets: list[AttackTarget],
    steer: Steer,
    stop_after: int | None = None,
) -> list[Image.Image]:
    """Return pictures of the targets' prompts and seeds whose latents go through `steer` after every step.

    `stop_after` ends the sampling after so many steps, where only what `steer` sees counts.
    """
    how = setup.sampling

    def callback(running: DiffusionPipeline, i: int, t: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        packed, plan = inputs["latents"], running.scheduler.timesteps
        upcoming = plan[i + 1] if i + 1 < len(plan) else None
        z = steer(i + 1, upcoming, family(pipe).unpacked(packed))
        running._interrupt = stop_after is not None and i + 1 >= stop_after
        return {"latents": repacked(z, packed)}

    return memoryless(pipe)(
        prompt=[target.prompt for target in targets],
        width=how.size,
        height=how.size,
        num_inference_steps=how.steps,
        guidance_scale=how.guidance,
        generator=[generator(target.seed, "image") for target in targets],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents"],
        output_type="pil" if stop_after is None else "latent",
    ).images


def repacked(z: Tensor, like: Tensor) -> Tensor:
    """Return latents (n, C, H, W) in the pipeline's own layout: unchanged, or as Flux's sequences (n, patches, D)."""
    from diffusers import FluxPipeline

    return (FluxPipeline._pack_latents(z, *z.shape) if like.ndim == 3 else z).to(like)


def noised_to(pipe: DiffusionPipeline, z: Tensor, noise: Tensor, t: Tensor | None) -> Tensor:
    """Return latents (n, C, H, W) at a timestep; None is the end, where no noise is left."""
    if t is None:
        return z
    return forward_process(pipe).add_noise(z, noise, t.to(z.device).expand(len(z)))


def noise_like(setup: AttackSetup, z: Tensor, attack: str, targets: list[AttackTarget]) -> Tensor:
    """Return noise for latents (n, C, H, W), each row from its own target's generator."""
    rows = [torch.randn(z.shape[1:], generator=setup.rng(attack, target.row)) for target in targets]
    return torch.stack(rows).to(z)
