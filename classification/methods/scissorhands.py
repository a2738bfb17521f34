"""Scissorhands as its classification code was released, which is not the paper's Algorithm 1."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from torch import Tensor

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import descend
from erase_sd.core.projection import coefficient, dot, subtract_
from erase_sd.core.task import Params, gradient
from erase_sd.methods.scissorhands import Scissorhands


@dataclass(frozen=True, kw_only=True)
class ClassifierScissorhands(Scissorhands):
    """Scissorhands, Wu & Harandi, ECCV 2024, arXiv 2401.06187, with the released code's memory where that is asked.

    Released: g_f is measured once an epoch, in evaluation mode, and limited to some layers; the forget set is walked
    through once in an epoch, and the rest of that epoch is plain training on the retain set.
    """

    memory_scope: str | None = knob(
        None, "released loop: expression of the parameters that are projected (default: Algorithm 1, all and fresh)"
    )
    project_every: int = knob(1, "released loop: joint steps from one projection to the next")
    trim_share: float = knob(1.0, "share p of D_f that saliency is measured on, in (0, 1] (Fig. 2)")

    def __post_init__(self) -> None:
        """Raise UserError for a share outside (0, 1]."""
        super().__post_init__()
        if not 0 < self.trim_share <= 1:
            raise UserError(f"--trim_share {self.trim_share} is outside (0, 1]: it is a share of the forget set")

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Run Algorithm 1 or, with a memory scope, the released loop; yield (record, state) after each step."""
        if self.memory_scope is None:
            yield from super().__call__(task, state)
            return
        if state is None or "measured" in state:
            record = yield from self.trim(task, state)
            state = {"step": 0, "optimizer": {}, "kept": {}}
            yield record, state
        yield from self.loop(task, state)

    def sensitivity(
        self, task: ClassificationTask, state: dict | None = None
    ) -> Generator[tuple[dict, dict], None, Params]:
        """Measure the saliency on the share of D_f and return it; yield (record, state) after each batch."""
        whole = task.walks["forget"]
        task.walks["forget"] = whole.part(self.trim_share)
        try:
            return (yield from super().sensitivity(task, state))
        finally:
            task.walks["forget"] = whole

    def loop(self, task: ClassificationTask, state: dict) -> Iterator[tuple[dict, dict]]:
        """Take joint steps against a stale memory while an epoch's forget batches last, plain ones after."""
        device = next(iter(task.trainable().values())).device
        memory: Params = {}
        for name, g in state.get("kept", {}).items():
            memory[name] = g.to(device)
        joint_steps = task.epoch("forget")
        joint = False  # whether the present step ascends L_f
        project = False  # whether its gradient is projected
        c = 0.0  # the coefficient of its projection, 0 where nothing was subtracted

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            nonlocal project, joint
            epoch, position = divmod(step, task.epoch("retain"))
            if position == 0:
                memory.update(self.forget_gradient(task, epoch))
            joint = position < joint_steps
            project = joint and (position + 1) % self.project_every == 0
            batch = task.pass_batch("repair", epoch, position)  # an epoch's forget batches are one pass through D_f
            if joint:
                return task.retain(batch) - self.lam * task.forget(batch)
            return task.retain(batch)

        def edit(g: Params) -> None:
            nonlocal c
            c = 0.0
            if project:
                inside = {name: g[name] for name in memory}
                c = coefficient(float(dot(inside, memory)), float(dot(memory, memory)), self.margin, self.ridge)
                subtract_(inside, memory, c)

        for record, now in descend(task, self, objective, state, edit=edit):
            yield record | {"c": c, "bit": c > 0, "joint": joint}, now | {"kept": dict(memory)}

    def forget_gradient(self, task: ClassificationTask, epoch: int) -> Params:
        """Return g_f of one batch, measured in evaluation mode, of the parameters in the memory's scope."""
        training = task.model.training
        task.model.eval()
        theta = {name: p for name, p in task.trainable().items() if re.search(self.memory_scope, name)}
        g = gradient(task, task.forget, task.batch("memory", epoch), theta)
        task.model.train(training)
        return g
