"""SalUn: teach wrong predictions, but only to the weights that the forget set moves most."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent, descend
from erase_sd.core.sensitivity import averages, entries, magnitude, same, top_k
from erase_sd.core.task import Params, Task
from erase_sd.methods.base import GENTLE, POCKET, Method, Sizes

RELEASED = GENTLE | {"schedule": "constant", "mask_mode": "released", "batch_size": 8, "drop_captions": 0.0}
PRESETS = {  # Adam does not see the factor by which the loss is rescaled here: the rates are the released ones
    # SD/train-scripts/nsfw_removal.py: MSE to the current network's anchor + 0.1 L_r, one epoch of 800 images.
    "authors-nsfw": RELEASED | {"redirect_weight": 10.0, "lr": 1e-5, "steps": 100},
    # random_label.py: alpha 0.5, five epochs.
    "authors-cls": RELEASED | {"redirect_weight": 2.0, "lr": 1e-5, "steps": 500},
    "sd": GENTLE | {"redirect_weight": 2.0, "lr": 1e-5, "batch_size": 16, "steps": 125},
    "pocket": GENTLE | POCKET | {"redirect_weight": 2.0, "lr": 1e-4, "steps": 150},
}


@dataclass(frozen=True, kw_only=True)
class SalUn(Descent, Method):
    """SalUn, Fan et al., ICLR 2024, arXiv 2310.12508: redirect the forget data, training the salient weights only."""

    mask_fraction: float = knob(0.5, "share of the weights that is trained: the largest |grad L_f|; in [0, 1]")
    mask_mode: Literal["hard", "gradient", "released"] = knob(
        "hard",
        "keep the others as they are; only mask their gradient, so that weight decay moves them; released code for "
        "Stable Diffusion: this, and grad L_f under guidance",
    )
    redirect_weight: float = knob(1.0, "weight of the redirect loss beside L_r")
    sensitivity_batches: int = knob(10, "batches over which grad L_f is averaged")

    sensitivity_passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Raise UserError for a share outside [0, 1]."""
        super().__post_init__()
        if self.mask_fraction > 1:
            raise UserError(f"--mask_fraction {self.mask_fraction} is outside [0, 1]: it is a share of the weights")

    def averaged(self, n: Sizes) -> int:
        """Return the number of trained entries: the mask is of those."""
        return n.trained

    def kept_bytes(self, width: int) -> int:
        """Return the bytes of an entry of the mask and of its frozen value."""
        return 1 + 4

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend L_r + w L_redirect over the salient weights; yield per sensitivity batch, mask and step."""
        if state is None or "measured" in state:
            state = {"step": 0, "optimizer": {}, "kept": (yield from self.masks(task, state))}
            yield {"phase": "mask"}, state

        def objective(batch: Any, step: int) -> Iterator[Tensor]:
            yield task.retain(batch)
            yield self.redirect_weight * task.redirect(batch)

        yield from masked(task, self, objective, state)

    def masks(self, task: Task, state: dict | None) -> Generator[tuple[dict, dict], None, dict[str, Tensor]]:
        """Return True where |grad L_f|, averaged with its sign, is among the largest of all weights together."""
        passes = {"g_f": (task.guided if self.mask_mode == "released" else task.forget, same)}
        means = yield from averages(task, passes, task.trainable(), self.sensitivity_batches, state)
        k = round(self.mask_fraction * entries(means["g_f"], task.shards))
        return top_k(magnitude(means["g_f"]), k, shards=task.shards)


def masked(
    task: Task, settings: SalUn, objective: Callable[[Any, int], Tensor], state: dict
) -> Iterator[tuple[dict, dict]]:
    """Descend an objective(batch, step) over the weights inside the masks in state["kept"], in place.

    Yields as `descend` does, the masks in every state.
    """
    theta = task.trainable()
    masks: dict[str, Tensor] = {}
    for name, mask in state["kept"].items():
        masks[name] = mask.to(theta[name].device)
    frozen: Params = {}  # what is masked out never moves
    for name, p in theta.items():
        frozen[name] = p.detach().clone()

    def edit(g: Params) -> None:
        for name, mask in masks.items():
            g[name] *= mask

    def after() -> None:
        if settings.mask_mode == "hard":
            put_back_(theta, masks, frozen)

    for record, now in descend(task, settings, objective, state, edit=edit, after=after):
        yield record, now | {"kept": masks}


@torch.no_grad()
def put_back_(theta: dict[str, nn.Parameter], masks: dict[str, Tensor], frozen: Params) -> None:
    """Give the entries outside the masks their frozen values again, in place: others hold the parameters."""
    for name, p in theta.items():
        p.copy_(torch.where(masks[name], p, frozen[name]))
