"""ESD: teach the network the opposite of its own guidance towards the concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from erase_sd.methods.objective import Objective
from erase_sd.options import knob

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import DenoisingTask


@dataclass(frozen=True, kw_only=True)
class ESD(Objective):
    """ESD, Gandikota et al., ICCV 2023, arXiv 2303.07345: fit e(x_t, c) to e_0(x_t, s) - eta (e_0(x_t, c) - e_0(x_t)).

    s = c with eta 2 (the current code) is the same target as s = "" with eta 1 (the paper). train_scope makes the
    variant: xattn is ESD-x, noxattn ESD-u. x_t are noised pictures of the concept that the original network drew
    whole, once; the published code draws a new one part of the way for every step, which costs it most of its time.
    """

    needs_original: ClassVar[bool] = True

    eta: float = knob(2.0, "how far to go against the guidance towards the concept")
    start: Literal["concept", "nothing", "anchor"] = knob("concept", "s, the caption from which to go that way")

    def objective(self, task: DenoisingTask, batch: Any, step: int) -> Tensor:
        """MSE(e(x_t, c_f), e_0(x_t, s) - eta (e_0(x_t, c_f) - e_0(x_t, "")))."""
        from torch.nn.functional import mse_loss

        x_t = task.add_noise(batch.z_f, batch.noise_f, batch.t_f)
        e_c = task.old(x_t, batch.t_f, batch.c_f)
        e_0 = task.old(x_t, batch.t_f, task.nothing(len(x_t)))
        e_s = {"concept": e_c, "nothing": e_0}.get(self.start)
        e_s = task.old(x_t, batch.t_f, batch.c_a) if e_s is None else e_s
        return mse_loss(task.predict(x_t, batch.t_f, batch.c_f), e_s - self.eta * (e_c - e_0))
