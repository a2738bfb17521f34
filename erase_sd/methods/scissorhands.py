"""Scissorhands: re-initialise the connections a concept depends on, then repair with projected gradients."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.repair import Repair

if TYPE_CHECKING:
    from erase_sd.core.task import Params, Task


@dataclass(frozen=True, kw_only=True)
class Scissorhands(Repair):
    """Scissorhands, Wu & Harandi, ECCV 2024, arXiv 2401.06187: connection sensitivity, trim, projected repair."""

    fraction: float = knob(0.005, "share of the ranked entries to re-initialise, in [0, 1]; 0 trims nothing")
    saliency: Literal["abs", "signed", "summed", "contrast", "gradient", "magnitude", "random"] = knob(
        "abs", "|theta g_f|; Eq. 2; theta sum|g_f| (released); forget/retain Fisher; |g_f|, |theta|, chance (Remark 1)"
    )
    init: Literal["uniform", "normal", "kaiming", "truncated", "zeros", "ones"] = knob("uniform", "the new values")
    sensitivity_batches: int = knob(10, "batches over which gradients are averaged before ranking")
    strict: bool = knob(False, "select s > threshold only (released code) instead of exactly the top k")

    def __post_init__(self) -> None:
        """Raise UserError for a fraction outside [0, 1] and for a ranking without a batch."""
        super().__post_init__()
        if not 0 <= self.fraction <= 1:
            raise UserError(f"--fraction {self.fraction} is outside [0, 1]: it is a share of entries to re-initialise")
        if self.fraction and self.sensitivity_batches < 1:
            raise UserError("--sensitivity_batches 0 ranks nothing: give 1 or more, or --fraction 0 to trim nothing")

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Trim, then repair, in place; yields per sensitivity batch, after the trim and per repair step."""
        from erase_sd.core.repair import repair

        if state is None or "measured" in state:
            record = yield from self.trim(task, state)
            state = {"step": 0, "optimizer": {}}
            yield record, state
        yield from repair(task, self, state)

    def trim(self, task: Task, state: dict | None = None) -> Generator[tuple[dict, dict], None, dict]:
        """Yield after each sensitivity batch, re-initialise, and return the record of that."""
        from erase_sd.core.sensitivity import entries, top_k
        from erase_sd.core.trim import reinitialise_

        changed = {}
        if self.fraction:
            s = yield from self.sensitivity(task, state)
            masks = top_k(s, round(self.fraction * entries(s, task)), self.strict, task)
            changed = reinitialise_(task.trimmable(), masks, self.init, task.seed, task)
        return {"phase": "trim", "changed": changed}

    def sensitivity(self, task: Task, state: dict | None = None) -> Generator[tuple[dict, dict], None, Params]:
        """Yield after each batch; return the saliency of every ranked entry."""
        import torch

        from erase_sd.core.sensitivity import averages, chance, connection_sensitivity, contrastive, magnitude

        theta = task.ranked()
        if self.saliency in ("magnitude", "random"):
            return magnitude(theta) if self.saliency == "magnitude" else chance(theta, task.seed, task)
        same = lambda g: g  # noqa: E731
        passes = {"g_f": (task.forget, torch.abs if self.saliency == "summed" else same)}
        if self.saliency == "contrast":
            passes = {"g_f": (task.contrast, same), "fisher_f": (task.contrast, torch.square)}
            passes |= {"fisher_r": (task.retain, torch.square)}
        g_f, *fisher = (yield from averages(task, passes, theta, self.sensitivity_batches, state)).values()
        if self.saliency == "contrast":
            return contrastive(theta, g_f, *fisher, eps=0.1, shards=task)
        if self.saliency == "gradient":
            return magnitude(g_f)
        return connection_sensitivity(theta, g_f, "signed" if self.saliency == "signed" else "abs")
