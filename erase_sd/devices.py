"""The accelerator of this process; several CPU processes have to be told that they belong together."""

import torch
from accelerate import Accelerator


def accelerator(mixed_precision: str | None) -> Accelerator:
    """Device, precision and process group as `accelerate launch` or torchrun set them up."""
    return Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
