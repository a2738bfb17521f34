"""Knobs of the repair loop; free of torch, so that --help answers at once."""

from dataclasses import dataclass, fields
from typing import Literal

from erase_sd.options import knob
from erase_sd.process import UserError


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Knobs of the repair loop; the defaults are Algorithm 1 to the letter, with the paper's CIFAR-10 lambda."""

    steps: int = knob(125, "repair steps")
    lr: float = knob(1e-5, "peak learning rate")
    lam: float = knob(0.05, "weight of the forget term beside the retain loss, >= 0")
    retain_loss: Literal["data", "original"] = knob(
        "data", "what the repair keeps: L_r on the retain data, or the original model's own answers to them"
    )
    objective: Literal["ascent", "redirect"] = knob("ascent", "forget term: raise L_f, or fit the replacement instead")
    constraint: Literal["forget", "contrast"] = knob(
        "forget", "loss that no step may lower: L_f, or L_f - replacement's"
    )
    projection: Literal["on", "off", "after-preconditioning"] = knob(
        "on", "project the gradient, nothing, or the update the optimiser makes of it"
    )
    optimizer: Literal["sgd", "adamw"] = knob("sgd", "optimiser, without momentum (sgd) and without weight decay")
    schedule: Literal["constant", "linear", "cosine"] = knob(
        "constant", "decay of the learning rate to 0 over the steps"
    )
    warmup_steps: int = knob(0, "steps over which the learning rate first rises linearly")
    margin: float = knob(0.0, "least multiplier v of a projection that bites, in units of g_f (released code: 0.5)")
    ridge: float = knob(0.0, "added to |g_f|^2 in the projection, squared gradient units (released code: 1e-3)")
    forget_ceiling: float | None = knob(
        None, "under ascent: forget loss above which lam is 0 for the step, in units of L_f"
    )
    release_at: float | None = knob(
        None, "constraint loss from which on the projection rests, in units of that loss; not for ascent on L_f"
    )
    project_from: int = knob(0, "first step at which the projection is on")
    max_grad_norm: float | None = knob(None, "clip the projected gradient to this L2 norm")

    def __post_init__(self) -> None:
        """Raise UserError for a negative number: none of them has a meaning."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "release_at" and isinstance(value, int | float) and not value >= 0:
                raise UserError(f"--{f.name} {value} is negative: give 0 or more")
