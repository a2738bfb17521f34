"""What a step of a diffusion model is computed from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from erase_sd.families import Cond


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
    z_a: Tensor | None = None  # the anchors' pictures, if they were drawn
    marks: Tensor | None = None  # (n, L) where the concept stands in c_f, see erase_sd.tokens

    def rows(self, chosen: slice) -> Batch:
        """Some of the samples."""
        return Batch(*(_rows(column, chosen) for column in self))


def _rows(column: Tensor | Cond | None, chosen: slice) -> Tensor | Cond | None:
    if isinstance(column, dict):
        return {name: x[chosen] for name, x in column.items()}
    return None if column is None else column[chosen]
