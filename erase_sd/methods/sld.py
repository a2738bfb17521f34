"""Safe Latent Diffusion: no weight moves; guidance steers every image away from the concept."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from erase_sd.common.cli import knob, not_negative
from erase_sd.common.errors import UserError
from erase_sd.core.task import DiffusionTask
from erase_sd.methods.base import POCKET, Method
from erase_sd.models.guidance import SafetyGuidance, Settings, attach

SIGNED = frozenset({"threshold"})  # numbers that may be negative
TEXT = ("encoder_hidden_states", "text_embeds", "pooled_projections")  # what of a conditioning the words decide

# It trains nothing: the least of weights and images that a job can do with.
LEAST = {"train_scope": r"re:^(conv|proj)_out\.", "anchor_model": "current", "forget_images": 1, "retain_images": 1}
MAX = LEAST | {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7}
PRESETS = {
    # The authors' configurations; weak is that of diffusers, while ESD's scripts have s_S = 200.
    "weak": LEAST | {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0},
    "medium": LEAST | {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum": 0.4},
    "strong": LEAST | {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5, "momentum": 0.7},
    "max": MAX,
    "sd": MAX,
    "pocket": POCKET | MAX,
}


@dataclass(frozen=True, kw_only=True)
class SLD(Method):
    """SLD, Schramowski et al., CVPR 2023, arXiv 2211.05105: formula in erase_sd.models.guidance. Trains nothing.

    The concept's own words are the safety concept; the paper's is a sentence of twenty inappropriate things, which is
    one concept here. Several concepts take turns, one in each denoising step.
    """

    trains: ClassVar[bool] = False

    warmup: int = knob(10, "network calls at the start of an image without safety guidance")
    scale: float = knob(1000.0, "s_S, guidance per unit of |e_p - e_S|, cut at 1")
    threshold: float = knob(0.01, "lambda: elements where e_p - e_S is less are guided")
    momentum_scale: float = knob(0.3, "s_m, weight of the momentum")
    momentum: float = knob(0.4, "beta of the momentum's running mean, in [0, 1)")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        not_negative(self, SIGNED)
        if self.momentum >= 1:
            raise UserError(f"--momentum {self.momentum} never forgets the past: give less than 1")

    def check_network(self, model: nn.Module, trained: Collection[str]) -> None:
        """Raise UserError for Flux."""
        if "guidance_embeds" in model.config:
            raise UserError("sld needs classifier-free guidance, which Flux has not: erase from SD 1, 2, XL or 3")

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Make the network carry the guidance; yield once."""
        text = {name: x for name, x in task.concept_cond().items() if name in TEXT}
        attach(task.model, SafetyGuidance(text, Settings(**asdict(self))))
        if state is None:
            yield {"step": 0}, {"step": 1}
