"""Boundary expanding: the forget set becomes a class of its own, which is then cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.descent import Descent
from erase_sd.methods.base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from classification.task import ClassificationTask, ClassifierBatch


@dataclass(frozen=True, kw_only=True)
class BoundaryExpanding(Descent, Method):
    """BE, Chen et al., CVPR 2023, arXiv 2303.11570: teach D_f a shadow class, then prune that output."""

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend l(f'(x_f), K), where f' has output K beside f's 0 .. K - 1; the output itself is not kept.

        The released code keeps it, so that its confidences are shares of K + 1 classes.
        """
        import torch
        import torch.nn.functional as F

        from classification.methods import expanding as heads
        from erase_sd.core.descent import descend

        widened = heads.Widened(task.model, task.seed)
        shadow = {f"shadow.{name}": p for name, p in widened.shadow.named_parameters()}
        for name, p in shadow.items() if state is not None else ():
            p.data.copy_(state["kept"][name])

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            logits = widened.logits(task.logits(batch.forget.x))
            return F.cross_entropy(logits, torch.full_like(batch.forget.y, logits.shape[1] - 1))

        with widened:
            for record, now in descend(task, self, objective, state, besides=shadow):
                yield record, now | {"kept": {name: p.detach() for name, p in shadow.items()}}


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
