"""What a step of a diffusion model is computed from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erase_sd.families import Cond
from erase_sd.knobs import Losses
from erase_sd.latents import Samples
from erase_sd.noising import Process


class Batch(NamedTuple):
    """This rank's slice: latents, timesteps, noise and captions' conditioning of n forget and n retain samples."""

    z_f: Tensor
    t_f: Tensor
    noise_f: Tensor
    c_f: Cond
    c_a: Cond
    z_r: Tensor
    t_r: Tensor
    noise_r: Tensor
    c_r: Cond
    z_d: Tensor  # what redirect is fitted on: z_f, or for half of the samples their anchors' pictures
    t_d: Tensor  # and when: t_f, or the noisiest of several draws
    z_a: Tensor | None = None  # the anchors' pictures, if they were drawn
    marks: Tensor | None = None  # (n, L) where the concept stands in c_f, see erase_sd.tokens

    def rows(self, chosen: slice) -> Batch:
        """Some of the samples."""
        return Batch(*(_rows(column, chosen) for column in self))


def _rows(column: Tensor | Cond | None, chosen: slice) -> Tensor | Cond | None:
    if isinstance(column, dict):
        return {name: x[chosen] for name, x in column.items()}
    return None if column is None else column[chosen]


def draw(s: Samples, process: Process, knobs: Losses, g: torch.Generator) -> dict[str, Tensor]:
    """One forget and one retain sample with their timesteps, noise and rows of the captions."""
    f, r = (int(torch.randint(n, (), generator=g)) for n in (len(s.forget), len(s.retain)))
    t_f, t_r = process.draw(2, g)
    noise_f, noise_r = torch.randn(2, *s.forget.shape[1:], generator=g)
    dropped = torch.rand((), generator=g) < knobs.drop_captions
    swap = s.anchors is not None and torch.rand((), generator=g) < 0.5
    forget = {"z_f": s.forget[f], "t_f": t_f, "noise_f": noise_f, "c_f": s.caption[f], "c_a": s.anchor[f]}
    retain = {"z_r": s.retain[r], "t_r": t_r, "noise_r": noise_r}
    retain["c_r"] = torch.tensor(s.empty) if dropped else s.keep[r]
    more = {name: x[f] for name, x in (("z_a", s.anchors), ("marks", s.marks)) if x is not None}
    t_d = torch.stack([t_f, *process.draw(knobs.redirect_draws - 1, g)]).max()
    return forget | retain | more | {"z_d": s.anchors[f] if swap else s.forget[f], "t_d": t_d}
