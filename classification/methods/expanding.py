"""Boundary expanding: the forget set becomes a class of its own, which is then cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from erase_sd.core.knobs import Descent

if TYPE_CHECKING:
    from torch import Tensor

    from classification.task import Batch, ClassificationTask


@dataclass(frozen=True, kw_only=True)
class BoundaryExpanding(Descent):
    """BE, Chen et al., CVPR 2023, arXiv 2303.11570: teach D_f a shadow class, then prune that output."""

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend l(f'(x_f), K), where f' has output K beside f's 0 .. K - 1; the output itself is not kept.

        The released code keeps it, so that its confidences are shares of K + 1 classes.
        """
        import torch
        import torch.nn.functional as F

        from classification import heads
        from erase_sd.core.descent import descend

        widened = heads.Widened(task.model, task.seed)
        shadow = {f"shadow.{name}": p for name, p in widened.shadow.named_parameters()}
        for name, p in shadow.items() if state is not None else ():
            p.data.copy_(state["kept"][name])

        def objective(batch: Batch, step: int) -> Tensor:
            logits = widened.logits(task.logits(batch.forget.x))
            return F.cross_entropy(logits, torch.full_like(batch.forget.y, logits.shape[1] - 1))

        with widened:
            for record, now in descend(task, self, objective, state, besides=shadow):
                yield record, now | {"kept": {name: p.detach() for name, p in shadow.items()}}
