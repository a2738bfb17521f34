"""SalUn as its classification code was released: passes through the data instead of a forget batch in every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.core.sensitivity import entries, magnitude, top_k
from erase_sd.core.task import Params, gradient
from erase_sd.methods.salun import SalUn, masked


@dataclass(frozen=True, kw_only=True)
class ClassifierSalUn(SalUn):
    """SalUn, Fan et al., ICLR 2024, arXiv 2310.12508: redirect the forget data, training the salient weights only.

    Released: an epoch sees every example of D_f and D_r once. With CIFAR in the Scissorhands repository they are mixed
    in one shuffled walk, elsewhere a pass through D_f comes before one through D_r; the mask is that of one whole pass
    in evaluation mode. `redirect_weight` and `sensitivity_batches` belong to the pairs.
    """

    walk: Literal["pairs", "joint", "turns"] = knob(
        "pairs", "a batch of D_f beside every batch of D_r, both mixed in one walk, or D_f before D_r in each epoch"
    )

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend over the salient weights; yield per sensitivity batch, mask and step."""
        if self.walk == "pairs":
            yield from super().__call__(task, state)
            return
        if state is None:
            state = {"step": 0, "optimizer": {}, "kept": self.whole_pass_masks(task)}
            yield {"phase": "mask"}, state
        if self.walk == "joint":
            task.join()

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            return self.released(task, *divmod(step, task.epoch(self.walk)))

        yield from masked(task, self, objective, state)

    def released(self, task: ClassificationTask, epoch: int, position: int) -> Tensor:
        """Return the loss of one step of an epoch, a scalar."""
        if self.walk == "joint":
            return task.mixed(task.pass_batch("repair", epoch, position))
        first = task.epoch("forget")
        if position < first:
            return task.redirect(task.pass_batch("repair", epoch, position))
        return task.retain(task.pass_batch("repair", epoch, position - first))

    def whole_pass_masks(self, task: ClassificationTask) -> dict[str, Tensor]:
        """Return True where |grad L_f|, summed over one pass in evaluation mode, is among the largest."""
        training = task.model.training
        task.model.eval()
        total: Params = {}
        for position in range(task.epoch("forget")):
            batch = task.pass_batch("sensitivity", 0, position)
            for name, g in gradient(task, task.forget, batch, task.trainable()).items():
                total[name] = total[name] + g if position else g
        task.model.train(training)
        k = int(self.mask_fraction * entries(total, task.shards))
        return top_k(magnitude(total), k, shards=task.shards)
