"""LoTUS: smooth the teacher's answers on the forget set until they are as uncertain as on data it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from classification.data.dataset import Images
from classification.data.transforms import to_float
from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.descent import Descent, descend
from erase_sd.methods.base import Method

ENOUGH = -0.01  # the gap of accuracies at which the released code stops


@dataclass(frozen=True, kw_only=True)
class Lotus(Descent, Method):
    """LoTUS, Spartalis et al., CVPR 2025, arXiv 2503.18314: cross-entropy to draws from the teacher, soft ones on D_f.

    tau = exp(alpha (accuracy of the student on D_f - of the teacher on unseen data)), anew in each epoch; the second
    accuracy counts 0 where whole classes are forgotten. D_f and a share of D_r are mixed in one shuffled walk.
    """

    alpha: float = knob(2.0, "how fast the temperature falls with the gap of accuracies (class unlearning: 32)")
    retain_share: float = knob(0.3, "share of D_r that is walked through beside D_f, in (0, 1]")

    def __post_init__(self) -> None:
        """Raise UserError for a share outside (0, 1]."""
        super().__post_init__()
        if not 0 < self.retain_share <= 1:
            raise UserError(f"--retain_share {self.retain_share} is outside (0, 1]: it is a share of the retain set")

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend in place until D_f is known less than unseen data; yield (record, state) after each step."""
        task.join(self.retain_share)
        per_epoch = task.epoch("joint", self.retain_share)
        aim = self.aim(task)
        gap = 0.0

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            x, y, other = task.pass_batch("repair", *divmod(step, per_epoch)).joint
            with torch.no_grad():
                noisy = task.original()(x) + gumbel(task, step, len(x), task.walks["joint"].classes)
                soft = (noisy / math.exp(self.alpha * gap)).softmax(1)
                hard = torch.zeros_like(soft).scatter(1, noisy.argmax(1, keepdim=True), 1.0)
                wanted = torch.where((other != y)[:, None], soft, hard)  # of D_f it is another label
            return -(wanted * task.logits(x).log_softmax(1)).sum(1).mean()

        step = state["step"] if state else 0
        gap = self.gap(task, aim) if step % per_epoch == 0 else float(state["kept"]["gap"])
        if gap <= ENOUGH:
            return
        for record, now in descend(task, self, objective, state):
            yield record | {"gap": gap}, now | {"kept": {"gap": torch.tensor(gap, dtype=torch.float64)}}
            if now["step"] % per_epoch == 0:
                gap = self.gap(task, aim)
                if gap <= ENOUGH:
                    return

    def aim(self, task: ClassificationTask) -> float:
        """Return the teacher's accuracy on unseen data in [0, 1]; 0 where whole classes are forgotten."""
        gone, kept = task.walks["forget"].images.labels, task.walks["retain"].images.labels
        if task.unseen is None or not torch.isin(gone, kept).any():
            return 0.0
        return right(task, task.original(), task.unseen)

    def gap(self, task: ClassificationTask, aim: float) -> float:
        """Return how much better the student is on D_f than it should be, in [-1, 1]."""
        return right(task, task.model, task.walks["forget"].images) - aim


@torch.no_grad()
def right(task: ClassificationTask, model: nn.Module, images: Images) -> float:
    """Return the share of images that a model classifies right in evaluation mode."""
    training = model.training
    model.eval()
    hits = 0
    for rows in torch.arange(len(images)).split(task.settings.batch_size):
        x = to_float(images.pixels[rows]).to(task.accelerator.device)
        hits += int((model(x).argmax(1).cpu() == images.labels[rows]).sum())
    model.train(training)
    return hits / len(images)


def gumbel(task: ClassificationTask, step: int, n: int, classes: int) -> Tensor:
    """Return Gumbel noise (n, classes) of this rank's samples of a step: argmax(logits + noise) is a draw of them."""
    ranks, rank = task.accelerator.num_processes, task.accelerator.process_index
    u = torch.rand(n * ranks, classes, generator=generator(task.seed, "gumbel", step))[rank::ranks]
    return -(-u.clamp(min=1e-20).log()).clamp(min=1e-20).log().to(task.accelerator.device)
