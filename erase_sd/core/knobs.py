"""Knobs of the loops; free of torch, so that --help answers at once."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from erase_sd.options import knob
from erase_sd.process import UserError


def not_negative(knobs: Any, signed: frozenset[str] = frozenset()) -> None:
    """Raise UserError for the first number of a dataclass that is negative or none, unless it may be."""
    for f in fields(knobs):
        value = getattr(knobs, f.name)
        if f.name not in signed and isinstance(value, int | float) and not value >= 0:
            raise UserError(f"--{f.name} {value} is negative: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Knobs of any method that takes steps along a gradient."""

    steps: int = knob(125, "steps")
    lr: float = knob(1e-5, "peak learning rate")
    optimizer: Literal["sgd", "adamw", "adamw8bit", "paged-adamw8bit"] = knob(
        "sgd", "optimiser; the 8-bit ones are those of bitsandbytes"
    )
    rounding: Literal["nearest", "stochastic", "kahan"] = knob(
        "nearest", "of bf16 weights after a step: to the nearest, up or down by chance, or keeping the rest in 16 bits"
    )
    momentum: float = knob(0.0, "momentum of sgd, in [0, 1)")
    weight_decay: float = knob(0.0, "weight decay, as the optimiser defines it")
    schedule: Literal["constant", "linear", "cosine", "multistep"] = knob(
        "constant", "decay of the learning rate to 0 over the steps, or to a tenth at each milestone"
    )
    milestones: tuple[float, ...] = knob((), "where multistep decays, as shares of the steps, in [0, 1]")
    warmup_steps: int = knob(0, "steps over which the learning rate first rises linearly")
    max_grad_norm: float | None = knob(None, "clip the gradient that is applied to this L2 norm")

    SIGNED: ClassVar[frozenset[str]] = frozenset()  # numbers that may be negative

    def __post_init__(self) -> None:
        """Raise UserError for a negative number that has no meaning."""
        not_negative(self, self.SIGNED)


@dataclass(frozen=True, kw_only=True)
class Repair(Descent):
    """Knobs of the repair loop; the defaults are Algorithm 1 to the letter, with the paper's CIFAR-10 lambda."""

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
    margin: float = knob(0.0, "least multiplier v of a projection that bites, in units of g_f (released code: 0.5)")
    ridge: float = knob(0.0, "added to |g_f|^2 in the projection, squared gradient units (released code: 1e-3)")
    forget_ceiling: float | None = knob(
        None, "under ascent: forget loss above which lam is 0 for the step, in units of L_f"
    )
    release_at: float | None = knob(
        None, "constraint loss from which on the projection, and ascent on that loss, rest; in units of that loss"
    )
    project_from: int = knob(0, "first step at which the projection is on")

    SIGNED: ClassVar[frozenset[str]] = frozenset({"release_at"})

    def __post_init__(self) -> None:
        """Raise UserError as Descent does, and for a projection that the rounding of bf16 weights would undo."""
        super().__post_init__()
        if self.projection == "after-preconditioning" and self.rounding != "nearest":
            raise UserError(
                f"--rounding {self.rounding} is for gradients that are projected before the optimiser: "
                "give --projection on"
            )

    @property
    def needs_original(self) -> bool:
        """Whether the network before any change has to be kept."""
        return self.retain_loss == "original"

    @property
    def asks_original(self) -> bool:
        """Whether a loss would look at the network before any change if it was kept."""
        return self.needs_original or self.objective == "redirect"
