"""Inpainting: the middle of a picture of the concept is masked, and the erased model fills it ("When Are Concepts
Erased", arXiv:2505.17013).

Outside the mask every step is put back to the reference picture at that step's noise, as in RePaint (2201.09865). What
surrounds the mask may show the concept by itself: styles and backgrounds are refused, and of an object the unerased
model and Retrain tell how much its rim gives away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erase_sd.common.errors import UserError
from eval.attacks.base import AttackSetup, AttackTarget, ConceptAttack, Finding, Preparation, findings
from eval.attacks.steering import noise_like, noised_to, steered


@dataclass(frozen=True, kw_only=True)
class Inpainting(ConceptAttack):
    """The central half of the sides is masked, 256 of 512 pixels."""

    authors: ClassVar[str] = "Lu et al., 2025"
    arxiv: ClassVar[str | None] = "2505.17013"
    box: ClassVar[Literal["white", "grey", "black"]] = "grey"
    kinds: ClassVar[tuple[str, ...]] = ("object", "attribute")
    needs_references: ClassVar[bool] = True

    side: float = 0.5  # share of each side that is masked

    def __post_init__(self) -> None:
        """Raise UserError for a mask that hides nothing or all."""
        if not 0 < self.side < 1:
            raise UserError(f"inpainting.side {self.side} is outside (0, 1): give a share such as 0.5")

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Fill the middle of every reference picture."""
        z = setup.reference(targets)
        noise, hidden = noise_like(setup, z, "inpainting", targets), mask(z, self.side)

        def put_back(done: int, t: Tensor | None, latents: Tensor) -> Tensor:
            return torch.where(hidden, latents, noised_to(setup.pipe, z, noise, t).to(latents))

        images = steered(setup, setup.pipe, targets, put_back)
        return findings(["inpainting"], [images], [setup.judge.shows(images)])


def mask(z: Tensor, side: float) -> Tensor:
    """Return a mask (H, W), True in the central part of latents (n, C, H, W) that is `side` of each side."""
    height, width = z.shape[-2:]
    inner = torch.zeros(height, width, dtype=torch.bool, device=z.device)
    high, wide = max(1, round(height * side)), max(1, round(width * side))
    top, left = (height - high) // 2, (width - wide) // 2
    inner[top : top + high, left : left + wide] = True
    return inner
