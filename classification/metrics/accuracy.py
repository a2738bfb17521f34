"""The logits of a set of images, on which most other metrics rest, and their accuracy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from classification.data.dataset import Images
from classification.data.transforms import to_float


@torch.no_grad()
def logits(model: nn.Module, images: Images, batch_size: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """Return the logits of a model on `device` for the untransformed images, in eval mode: (N, K) float32, CPU."""
    parts = []
    with evaluating(model):
        for pixels in images.pixels.split(batch_size):
            parts.append(model(scaled(pixels, device)).float().cpu())
    return torch.cat(parts)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in [0, 1] of logits (N, K) for labels (N,); ValueError when there are none."""
    if not len(labels):
        raise ValueError("the accuracy on no examples is undefined")
    return (logits.argmax(1) == labels).double().mean().item()


def scaled(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 pixels as the models take them: float32 in [0, 1], on `device`."""
    return to_float(pixels.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside; outside, every layer is back in its own mode, be it frozen or not."""
    modes = {layer: layer.training for layer in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
