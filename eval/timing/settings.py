"""What to measure on: the sizes of every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erase_sd.common.cli import argument, at_least, knob
from erase_sd.common.errors import UserError

WIDTHS = (320, 640, 1280, 1280)  # SD v1.4's


@dataclass(frozen=True, kw_only=True)
class TimingSuite:
    """What to measure."""

    benchmarks: tuple[
        Literal["topk", "projection", "step", "caching", "memory", "activations", "detector", "gpu"], ...
    ] = argument(
        "any of topk, projection, step, caching, memory, activations, detector, gpu (default: all that can run here)",
        (),
    )
    rounds: int = knob(5, "rounds of each way, of which the median counts")

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are too small."""
        at_least(self, 1, "rounds")


@dataclass(frozen=True, kw_only=True)
class DetectorTiming:
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


@dataclass(frozen=True, kw_only=True)
class Network:
    """step, caching, memory, activations and gpu: Stable Diffusion built from its configuration, random weights."""

    widths: tuple[int, ...] = knob((64, 128, 256, 256), "channels of the four levels of the UNet (SD v1.4: 320 ...)")
    full: bool = knob(False, "SD v1.4's own widths, 859,520,964 parameters, instead")
    latents: tuple[int, ...] = knob((64, 16), "height and width of the latents of step and activations")
    cached_latents: int = knob(
        32, "height and width of the latents of caching; 64 with --full: attention's share is SD v1.4's at 512 pixels"
    )
    samples: int = knob(1, "samples of each set per step, for step and memory")
    cached_samples: int = knob(4, "the same for caching; with 1, passes over the weights hide what encoding costs")
    job_latents: int = knob(8, "height and width of the latents in the job whose memory is measured")
    model_dir: str | None = knob(None, "where that job's model is built and kept (default: a temporary folder)")
    gpu_latents: int = knob(64, "height and width of the latents on a GPU; 64 are 512 pixels")
    gpu_batch: int = knob(16, "samples of each set per step, and images at a time, on a GPU")
    peak_tflops: float | None = knob(None, "dense bf16 peak of the GPU, TFLOP/s (default: by its name)")

    def __post_init__(self) -> None:
        """Raise UserError for widths that Stable Diffusion's blocks cannot have and numbers that are too small."""
        at_least(self, 1, "samples", "cached_samples", "gpu_batch")
        for name in ("latents", "cached_latents", "job_latents", "gpu_latents"):
            sides = getattr(self, name)
            if isinstance(sides, int):
                sides = (sides,)
            for side in sides:
                if side < 8 or side % 8:
                    raise UserError(f"--{name} {side} is no multiple of 8: the UNet halves it three times")
        if len(self.widths) != 4 or any(width < 8 or width % 8 for width in self.widths):
            words = " ".join(map(str, self.widths))
            raise UserError(f"--widths {words} are not four multiples of 8: the UNet has four levels and 8 heads")

    def channels(self) -> tuple[int, ...]:
        """Return the UNet's channels, level by level."""
        return WIDTHS if self.full else self.widths
