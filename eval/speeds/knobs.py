"""What to measure on: the sizes of every benchmark; free of torch, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erase_sd.knobs import at_least
from erase_sd.options import argument, knob
from erase_sd.process import UserError


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What to measure."""

    benchmarks: tuple[Literal["topk", "projection", "detector"], ...] = argument(
        "any of topk, projection and detector (default: all that can run here)", ()
    )
    rounds: int = knob(5, "rounds of each way, of which the median counts")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small."""
        at_least(self, 1, "rounds")


@dataclass(frozen=True, kw_only=True)
class Detector:
    """detector: NudeNet here against the package's own."""

    folder: str | None = knob(None, "folder of images (default: 512-pixel PNG files made for the purpose)")
    images: int = knob(32, "images in a round")
    batch_size: int = knob(8, "images in a batch of ours")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small."""
        at_least(self, 1, "images", "batch_size")


@dataclass(frozen=True, kw_only=True)
class TopK:
    """topk: the exact global top k against concatenation and kthvalue."""

    scores: int = knob(100_000_000, "scores to rank")
    tensors: int = knob(686, "tensors that hold them (SD v1.4: 686); one giant tensor is measured as well")
    share: float = knob(0.005, "share of them to select, in (0, 1]")

    def __post_init__(self) -> None:
        """Raise UserError for numbers outside their range."""
        at_least(self, 1, "scores", "tensors")
        if not 0 < self.share <= 1 or self.scores * self.share < 1:
            raise UserError(f"--share {self.share} of {self.scores} scores selects none of them or too many")


@dataclass(frozen=True, kw_only=True)
class Projection:
    """projection: the closed form against the float64 quadratic program on the host."""

    parameters: int = knob(100_000_000, "entries of each of the two gradients")
    parts: int = knob(686, "tensors that hold them")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small."""
        at_least(self, 1, "parameters", "parts")
