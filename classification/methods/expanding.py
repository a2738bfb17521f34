"""Boundary expanding: the forget set becomes a class of its own, which is then cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.descent import Descent, descend
from erase_sd.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class BoundaryExpanding(Descent, Method):
    """BE, Chen et al., CVPR 2023, arXiv 2303.11570: teach D_f a shadow class, then prune that output."""

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend l(f'(x_f), K), where f' has output K beside f's 0 .. K - 1; the output itself is not kept.

        The released code keeps it, so that its confidences are shares of K + 1 classes.
        """
        widened = Widened(task.model, task.seed)
        shadow = {}
        for name, p in widened.shadow.named_parameters():
            shadow[f"shadow.{name}"] = p
        if state is not None:
            for name, p in shadow.items():
                p.data.copy_(state["kept"][name])

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            logits = widened.logits(task.logits(batch.forget.x))
            return F.cross_entropy(logits, torch.full_like(batch.forget.y, logits.shape[1] - 1))

        with widened:
            for record, now in descend(task, self, objective, state, besides=shadow):
                yield record, now | {"kept": {name: p.detach() for name, p in shadow.items()}}


class Widened:
    """A model whose last linear layer has, within the `with` block, a part of its own that computes one more output.

    It belongs to the model, so that whatever is done with the gradients of the model's parameters is done with its
    gradients too. The model's own logits stay as they are. Raises UserError for a model without a linear layer.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise UserError(f"{type(model).__name__} has no linear layer to widen: choose another method than be")
        self._head = layers[-1]
        self._seen = torch.empty(0)
        self.shadow = nn.Linear(self._head.in_features, 1)
        bound = self._head.in_features**-0.5  # as torch initialises a linear layer
        g = generator(seed, "shadow")
        for p in self.shadow.parameters():
            p.data.uniform_(-bound, bound, generator=g)
        self.shadow.to(self._head.weight.device)

    def __enter__(self) -> Self:
        self._head.add_module("shadow", self.shadow)
        self._hook = self._head.register_forward_pre_hook(self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        del self._head.shadow

    def _remember(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen = inputs[0]

    def logits(self, logits: Tensor) -> Tensor:
        """Return (n, K + 1): the logits (n, K) of the model's last forward pass and, as output K, the shadow's."""
        return torch.cat([logits, self.shadow(self._seen.float())], 1)
