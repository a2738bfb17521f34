"""Selective Amnesia: learn a surrogate under the concept's words, and hold what the other pictures depend on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import DiffusionTask, Params

T = 1000  # timesteps that the published Fisher information sums over


@dataclass(frozen=True, kw_only=True)
class SelectiveAmnesia(Descent):
    """SA, Heng & Soh, NeurIPS 2023, arXiv 2305.10120: L(q, c_f) + gamma L_r + lam sum_i F_i (theta_i - theta*_i)^2.

    q are the anchors' pictures under the concept's captions, theta* the weights before any change. The published
    F_i = 1/N sum_n (sum_t dL_nt/dtheta_i)^2 needs all T = 1000 timesteps of each picture. Here F_i = T^2 B E[g_i^2],
    g being the gradient of a batch of B pictures at one sampled timestep each: T^2 turns the mean over t into the sum,
    B the mean over the batch back into single pictures. As E[g] is about 0 in a trained model, this is T^2 times the
    variance over pictures and timesteps; the published one averages over t before it squares and so is smaller: the
    same lam holds harder here.
    """

    needs_anchor_pictures: ClassVar[bool] = True

    gamma: float = knob(1.0, "weight of the replay loss L_r")
    lam: float = knob(50.0, "weight of the penalty, in units of the loss; the paper writes lam / 2")
    fisher_batches: int = knob(50, "batches over which the Fisher information is averaged")

    def __post_init__(self) -> None:
        """Raise UserError for a penalty without a batch to measure it on."""
        super().__post_init__()
        if self.lam and self.fisher_batches < 1:
            raise UserError("--fisher_batches 0 measures no Fisher information: give 1 or more, or --lam 0")

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict | None]]:
        """Measure F, then descend; theta* and F travel in the state, since later weights do not tell them."""
        from erase_sd.core.descent import descend, inner
        from erase_sd.core.projection import subtract_

        theta = task.trainable()
        kept = state["kept"] if state else (yield from self.fisher(task)) | star(theta)
        kept = {name: x.to(next(iter(theta.values())).device) for name, x in kept.items()}
        now = {"penalty": 0.0}

        def objective(b: Any, step: int) -> Tensor:
            return task.forget(b._replace(z_f=b.z_a)) + self.gamma * task.retain(b)

        def edit(g: Params) -> None:
            d = {name: p.detach() - kept[f"star/{name}"] for name, p in theta.items()}
            Fd = {name: kept[f"fisher/{name}"] * x for name, x in d.items()} if self.lam else {}
            now["penalty"] = self.lam * inner(task, Fd, d) if Fd else 0.0
            subtract_({name: g[name] for name in Fd}, Fd, -2 * self.lam)

        for record, after in descend(task, self, objective, state, edit=edit):
            yield record | now | {"loss": record["loss"] + now["penalty"]}, after | {"kept": kept}

    def fisher(self, task: DiffusionTask) -> Generator[tuple[dict, None], None, dict[str, Tensor]]:
        """Yield a record per batch; return T^2 B E[g^2] of the replay loss."""
        import torch

        from erase_sd.core.sensitivity import accumulate

        F: Params = {}
        batches = range(self.fisher_batches if self.lam else 0)
        for F in accumulate(task, task.retain, task.trainable(), "fisher", batches, torch.square):  # noqa: B007
            yield {"phase": "fisher"}, None
        return {f"fisher/{name}": x * T**2 * task.knobs.batch_size for name, x in F.items()}


def star(theta: Params) -> dict[str, Tensor]:
    """theta*, copied."""
    return {f"star/{name}": p.detach().clone() for name, p in theta.items()}
