"""Pictures of the concept as latents: drawn by the original, or a folder of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.denoising.samples import sampled
from erase_sd.models.pipeline import encode_pictures
from erase_sd.settings import Sampling
from eval.attacks.base import AttackSampling, AttackTarget
from eval.images.folder import picture, read

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Originals:
    """The original model as a source of latents, which are cached and shared by all processes."""

    pipe: DiffusionPipeline
    sha256: str  # of its weights
    sampling: AttackSampling
    cache: Path

    def of_targets(self, targets: Sequence[AttackTarget]) -> Tensor:
        """Return (N, C, H, W) of the targets' plain prompts and seeds."""
        prompts, seeds = [], []
        for target in targets:
            prompts.append(target.prompt)
            seeds.append(target.seed)
        return self.of_prompts(prompts, seeds)

    def of_prompts(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Return (N, C, H, W) on the CPU, one for each prompt and seed."""
        how = Sampling(
            sample_steps=self.sampling.steps,
            sample_guidance=self.sampling.guidance,
            sample_batch_size=self.sampling.batch_size,
            resolution=self.sampling.size,
        )
        return sampled(self.pipe, prompts, seeds, how, self.sha256, self.cache, "pictures of the concept")


def from_folder(pipe: DiffusionPipeline, path: Path, sampling: AttackSampling) -> Tensor:
    """Return (N, C, H, W) on the CPU: every sound picture of a folder, squeezed to the size asked for and encoded.

    Raises UserError if there is none.
    """
    folder = read(path)
    images = []
    for entry in folder.entries:
        image, why = picture(folder, entry)
        if image is not None and not why:
            images.append(image)
    if not images:
        raise UserError(f"--pictures {path} holds no sound picture: give a folder with pictures of the concept")
    return torch.stack(encode_pictures(pipe, images, sampling.size))
