"""ESD: teach the network the opposite of its own guidance towards the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import DiffusionTask


@dataclass(frozen=True, kw_only=True)
class ESD(Objective):
    """ESD, Gandikota et al., ICCV 2023, arXiv 2303.07345: fit e(x_t, c) to e_0(x_t, s) - eta (e_0(x_t, d) - e_0(x_t)).

    c is a caption that has the concept among other things, d the concept's own words: against the guidance towards all
    of the caption, a style would be erased with every object drawn in it. Where both are the same words, as published,
    s = c with eta 2 (the current code) is the same target as s = "" with eta 1 (the paper). train_scope makes the
    variant: xattn is ESD-x, noxattn ESD-u. x_t are noised pictures of the concept that the original network drew
    whole, once; the published code draws a new one part of the way for every step, which costs it most of its time.
    """

    needs_original: ClassVar[bool] = True

    eta: float = knob(2.0, "how far to go against the guidance towards the concept")
    start: Literal["concept", "nothing", "anchor"] = knob("concept", "s, the caption from which to go that way")
    direction: Literal["words", "caption"] = knob("words", "d, what to go against: the concept's words, or c itself")

    def objective(self, task: DiffusionTask, batch: Any, step: int) -> Tensor:
        """MSE(e(x_t, c_f), e_0(x_t, s) - eta (e_0(x_t, d) - e_0(x_t, "")))."""
        from torch.nn.functional import mse_loss

        x_t, n = task.add_noise(batch.z_f, batch.noise_f, batch.t_f), len(batch.z_f)
        captions = {
            "concept": batch.c_f,
            "anchor": batch.c_a,
            "nothing": task.empty_cond(n),
            "words": task.concept_cond(n),
        }
        s, d = self.start, "words" if self.direction == "words" else "concept"
        e = {name: task.predict_original(x_t, batch.t_f, captions[name]) for name in {s, d, "nothing"}}  # each once
        return mse_loss(task.predict(x_t, batch.t_f, batch.c_f), e[s] - self.eta * (e[d] - e["nothing"]))
