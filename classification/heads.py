"""An output more for a classifier: a shadow class beside its own."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from erase_sd.process import UserError
from erase_sd.runtime import generator


class Widened:
    """Within its `with` block the last linear layer of a model has a part of its own that computes one more output.

    It belongs to the model, so that whatever is done with the gradients of the model's parameters is done with its
    gradients too. The model's answers stay as they are. Raises UserError for a model without a linear layer.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise UserError(f"{type(model).__name__} has no linear layer to widen: choose another method than be")
        self._head, self._seen = layers[-1], torch.empty(0)
        self.shadow = nn.Linear(self._head.in_features, 1)
        bound, g = self._head.in_features**-0.5, generator(seed, "shadow")  # as torch initialises a linear layer
        for p in self.shadow.parameters():
            p.data.uniform_(-bound, bound, generator=g)
        self.shadow.to(self._head.weight.device)

    def __enter__(self) -> Self:
        self._head.add_module("shadow", self.shadow)
        self._hook = self._head.register_forward_pre_hook(lambda _, inputs: setattr(self, "_seen", inputs[0]))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self._head.shadow

    def logits(self, logits: Tensor) -> Tensor:
        """The logits (n, K) of the model's last forward pass and, as output K, the shadow class's: (n, K + 1)."""
        return torch.cat([logits, self.shadow(self._seen.float())], 1)
