"""The logits of a set of images, on which most other metrics rest, and their accuracy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from classification.data.dataset import Images
from classification.data.transforms import to_float


@torch.no_grad()
def logits(model: nn.Module, images: Images, batch_size: int = 256, device: torch.device | str = "cpu") -> Tensor:
    """What the model, which is on `device`, answers to the untransformed images in eval mode: (N, K) float32, CPU."""
    with evaluating(model):
        return torch.cat([model(scaled(x, device)).float().cpu() for x in images.pixels.split(batch_size)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in [0, 1] of logits (N, K) for labels (N,); ValueError when there are none."""
    if not len(labels):
        raise ValueError("the accuracy on no examples is undefined")
    return (logits.argmax(1) == labels).double().mean().item()


def scaled(pixels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 pixels as the models take them: float32 in [0, 1], on `device`."""
    return to_float(pixels.to(device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, every layer is back in the mode it was in, be it frozen or not."""
    modes = {layer: layer.training for layer in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
