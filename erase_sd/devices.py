"""The accelerator of this process; several CPU processes have to be told that they belong together."""

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin


def accelerator(mixed_precision: str | None) -> Accelerator:
    """Device, precision and process group as `accelerate launch` or torchrun set them up."""
    return Accelerator(
        mixed_precision=mixed_precision,
        cpu=not torch.accelerator.is_available(),
        # micro-batches carry their share of the loss already: the launcher's number would divide it once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
