"""Image to image: the erased model finishes noised pictures of the concept ("When Are Concepts Erased", 2505.17013).

At strength s the last share s of the steps is the attacked model's; the plain prompt goes with them. What an erasure
that acts on layout leaves at low noise is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from erase_sd.common.errors import UserError
from eval.attacks.base import AttackSetup, AttackTarget, ConceptAttack, Finding, Preparation, findings
from eval.attacks.steering import noise_like, noised_to, steered


@dataclass(frozen=True, kw_only=True)
class ImageToImage(ConceptAttack):
    """One picture at every strength."""

    authors: ClassVar[str] = "Lu et al., 2025"
    arxiv: ClassVar[str | None] = "2505.17013"
    box: ClassVar[Literal["white", "grey", "black"]] = "grey"
    needs_references: ClassVar[bool] = True

    strengths: tuple[float, ...] = (0.6, 0.8, 0.9)

    def __post_init__(self) -> None:
        """Raise UserError for a strength that leaves nothing, or everything, to the model."""
        for strength in self.strengths:
            if not 0 < strength < 1:
                raise UserError(f"image-to-image.strengths {strength} is outside (0, 1): give one such as 0.8")

    @property
    def budget(self) -> str:
        """Say that it is a picture for every strength."""
        return f"one picture at each of the strengths {', '.join(map(str, self.strengths))}"

    def attempt(self, setup: AttackSetup, ready: Preparation, targets: list[AttackTarget]) -> list[Finding]:
        """Noise every reference picture to each strength and have it denoised."""
        labels, images, shown = [], [], []
        z = setup.reference(targets)
        noise = noise_like(setup, z, "image-to-image", targets)
        for strength in self.strengths:
            labels.append(f"strength {strength:g}")
            images.append(_denoised(setup, targets, z, noise, strength))
            shown.append(setup.judge.shows(images[-1]))
        return findings(labels, images, shown)


def skipped(steps: int, strength: float) -> int:
    """Return how many steps the noised picture stands for: at least one, and one is left for the model."""
    return min(max(1, steps - int(steps * strength)), max(1, steps - 1))


def _denoised(setup: AttackSetup, targets: list[AttackTarget], z: Tensor, noise: Tensor, strength: float) -> list:
    start = skipped(setup.sampling.steps, strength)

    def hand_over(done: int, t: Tensor | None, latents: Tensor) -> Tensor:
        return noised_to(setup.pipe, z, noise, t) if done == start else latents

    return steered(setup, setup.pipe, targets, hand_over)
