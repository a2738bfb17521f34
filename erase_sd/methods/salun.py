"""SalUn: teach wrong answers, but only to the weights that the forget data move most."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import Params, Task


@dataclass(frozen=True, kw_only=True)
class SalUn(Descent):
    """SalUn, Fan et al., ICLR 2024, arXiv 2310.12508: redirect the forget data, training the salient weights only."""

    mask_fraction: float = knob(0.5, "share of the weights that is trained: the largest |grad L_f|; in [0, 1]")
    mask_mode: Literal["hard", "gradient"] = knob(
        "hard", "keep the others as they are, or only mask their gradient (released code: weight decay moves them)"
    )
    redirect_weight: float = knob(1.0, "weight of the redirect loss beside L_r")
    sensitivity_batches: int = knob(10, "batches over which grad L_f is averaged")

    def __post_init__(self) -> None:
        """Raise UserError for a share outside [0, 1]."""
        super().__post_init__()
        if self.mask_fraction > 1:
            raise UserError(f"--mask_fraction {self.mask_fraction} is outside [0, 1]: it is a share of the weights")

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend L_r + w L_redirect over the salient weights; yields per sensitivity batch, mask and step."""
        import torch

        from erase_sd.core.descent import descend

        theta = task.trainable()
        if state is None or "measured" in state:
            state = {"step": 0, "optimizer": {}, "kept": (yield from self.masks(task, state))}
            yield {"phase": "mask"}, state
        masks = {name: mask.to(theta[name].device) for name, mask in state["kept"].items()}
        frozen = {name: p.detach().clone() for name, p in theta.items()}  # what is masked out never moves

        def objective(batch: Any, step: int) -> Tensor:
            return task.retain(batch) + self.redirect_weight * task.redirect(batch)

        def edit(g: Params) -> None:
            for name, mask in masks.items():
                g[name] *= mask

        def after() -> None:
            for name, p in theta.items() if self.mask_mode == "hard" else ():
                p.data.copy_(torch.where(masks[name], p, frozen[name]))  # in place: others hold it

        for record, now in descend(task, self, objective, state, edit=edit, after=after):
            yield record, now | {"kept": masks}

    def masks(self, task: Task, state: dict | None) -> Generator[tuple[dict, dict], None, dict[str, Tensor]]:
        """True where |grad L_f|, averaged with its sign, is among the largest of all weights together."""
        from erase_sd.core.sensitivity import averages, entries, top_k

        passes = {"g_f": (task.forget, lambda g: g)}
        g = (yield from averages(task, passes, task.trainable(), self.sensitivity_batches, state))["g_f"]
        k = round(self.mask_fraction * entries(g, task))
        return top_k({name: x.abs() for name, x in g.items()}, k, shards=task)
