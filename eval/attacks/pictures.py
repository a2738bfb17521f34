"""Pictures of the concept as latents: drawn by the original, or a folder of the user's own."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erase_sd.families import resolution
from erase_sd.knobs import Sampling
from erase_sd.latents import drawn
from erase_sd.process import UserError
from eval.attacks.base import Drawing
from eval.images import picture, read


def drawn_by_original(
    pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], drawing: Drawing, model_hash: str, cache: Path
) -> Tensor:
    """(N, C, H, W) on the CPU, from the cache where it has them; processes share them."""
    how = Sampling(
        sample_steps=drawing.steps,
        sample_guidance=drawing.guidance,
        sample_batch_size=drawing.batch_size,
        resolution=drawing.size,
    )
    return drawn(pipe, prompts, seeds, how, model_hash, cache, "pictures of the concept")


@torch.no_grad()
def from_folder(pipe: DiffusionPipeline, path: Path, drawing: Drawing) -> Tensor:
    """(N, C, H, W) on the CPU: every sound picture of a folder, squeezed to the drawing's size and encoded.

    Raises UserError if there is none.
    """
    folder, side = read(path), drawing.size or resolution(pipe)
    config, rows = pipe.vae.config, []
    for entry in folder.entries:
        image, why = picture(folder, entry)
        if why:
            continue
        pixels = pipe.image_processor.preprocess(image, height=side, width=side).to(pipe.device, pipe.vae.dtype)
        z = pipe.vae.encode(pixels).latent_dist.mode().float().cpu()
        rows.append((z - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor)
    if not rows:
        raise UserError(f"--pictures {path} holds no sound picture: give a folder with pictures of the concept")
    return torch.cat(rows)
