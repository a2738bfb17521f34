"""Safe Latent Diffusion: no weight moves; guidance steers every image away from the concept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError

if TYPE_CHECKING:
    from erase_sd.core.task import DiffusionTask

TEXT = ("encoder_hidden_states", "text_embeds", "pooled_projections")  # what of a conditioning the words decide


@dataclass(frozen=True, kw_only=True)
class SLD:
    """SLD, Schramowski et al., CVPR 2023, arXiv 2211.05105: formula in erase_sd.guidance. Trains nothing.

    The concept's own words are the safety concept; the paper's is a sentence of twenty inappropriate things.
    """

    trains: ClassVar[bool] = False

    warmup: int = knob(10, "network calls at the start of an image without safety guidance")
    scale: float = knob(1000.0, "s_S, guidance per unit of |e_p - e_S|, cut at 1")
    threshold: float = knob(0.01, "lambda: elements where e_p - e_S is less are guided")
    momentum_scale: float = knob(0.3, "s_m, weight of the momentum")
    momentum: float = knob(0.4, "beta of the momentum's running mean, in [0, 1)")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        for name in ("warmup", "scale", "momentum_scale", "momentum"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)} is negative: give 0 or more")
        if self.momentum >= 1:
            raise UserError(f"--momentum {self.momentum} never forgets the past: give less than 1")

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Make the network carry the guidance; yields once. Raises UserError for Flux."""
        from dataclasses import asdict

        from erase_sd.models.guidance import SafetyGuidance, Settings, attach

        if "guidance_embeds" in task.model.config:
            raise UserError("sld needs classifier-free guidance, which Flux has not: erase from SD 1, 2, XL or 3")
        text = {name: x for name, x in task.concept_cond(1).items() if name in TEXT}
        attach(task.model, SafetyGuidance(text, Settings(**asdict(self))))
        if state is None:
            yield {"step": 0}, {"step": 1}
