"""The last linear layer of a classifier: what it sees, and an output more for it."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from erase_sd.process import UserError
from erase_sd.runtime import generator


class Tap:
    """Within its `with` block, `value` holds what the last linear layer was given in the last forward pass."""

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise UserError(f"{type(model).__name__} has no linear layer to widen: choose another method than be")
        self.head, self.value = layers[-1], torch.empty(0)

    def __enter__(self) -> Self:
        self._hook = self.head.register_forward_pre_hook(lambda _, inputs: setattr(self, "value", inputs[0]))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def new_output(head: nn.Linear, seed: int) -> dict[str, Tensor]:
    """Weight (1, F) and bias (1,) of one more output, initialised as torch initialises a linear layer."""
    bound, g = head.in_features**-0.5, generator(seed, "shadow")
    draw = lambda *shape: nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=g).to(head.weight.device))  # noqa: E731
    return {"shadow.weight": draw(1, head.in_features), "shadow.bias": draw(1)}
