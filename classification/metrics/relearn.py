"""Relearn time: how many epochs of fine-tuning bring the forget set back. The sooner, the less was forgotten."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classification.data.dataset import Images
from classification.metrics.accuracy import accuracy, logits, scaled
from erase_sd.common.rng import generator, keyed_rng


def relearn(
    model: nn.Module,
    forget: Images,
    *,
    target: float,
    seed: int,
    retain: Images | None = None,
    lr: float = 1e-3,
    tol: float = 0.0,
    batch_size: int = 256,
    max_epochs: int = 200,
    device: torch.device | str = "cpu",
) -> int | None:
    """Return the epochs until Acc_f >= target - tol, both in [0, 1]: 0 if it is there, None if `max_epochs` do not do.

    The paper defines the target as the original model's Acc_f and no more; the rest is ours. A copy of the model, all
    of whose parameters may move, is trained on D_f, or on D_f and D_r where `retain` is given, without augmentation,
    by SGD (momentum 0.9, weight decay 5e-4) at the unlearning method's own `lr`; Acc_f is measured in eval mode.
    Raises FloatingPointError when it diverges.
    """
    model = deepcopy(model).to(device).train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    pixels, labels = forget.pixels, forget.labels
    if retain is not None:
        pixels = torch.cat([pixels, retain.pixels])
        labels = torch.cat([labels, retain.labels])

    def back() -> bool:
        return accuracy(logits(model, forget, batch_size, device), forget.labels) >= target - tol

    for epoch in range(max_epochs):
        if back():
            return epoch
        order = torch.randperm(len(labels), generator=generator(seed, "relearn", epoch))
        with keyed_rng(seed, "dropout", epoch, device=device):
            for rows in order.split(batch_size):
                _step(model, optimizer, scaled(pixels[rows], device), labels[rows].to(device))
    return max_epochs if back() else None


def shown(epochs: int | None, max_epochs: int) -> str:
    """Return the epochs as a table shows them: "17", or ">200" where they did not suffice."""
    return f">{max_epochs}" if epochs is None else str(epochs)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    loss = F.cross_entropy(model(x), y)
    if not loss.isfinite():  # NaN logits would count as class 0, and the cap as success of the unlearning
        raise FloatingPointError("the loss of relearning is not finite: lower its learning rate")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
